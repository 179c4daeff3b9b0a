"""Import this first: a template forked before anything else is loaded.

::

    import afork.early  # the first line of the main program

From then on every new process comes from that template: nothing is executed,
and what the program loads later does not weigh on its processes. Without
effect in a process that was made by afork itself.
"""

from ._main_template import fork_early

fork_early()
