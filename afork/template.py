"""The main program as prepared so far, forked as a template on import.

::

    import everything.that.workers.need

    def worker(sock): ...

    from afork.template import TEMPLATE

    TEMPLATE.fork().run(worker)

Tools that sort imports move such a line: ``TEMPLATE = afork.fork_main()`` says
the same where they leave it alone.
"""

from ._main_template import fork_main

#: The template; None in a process that was made by afork itself.
TEMPLATE = fork_main()
