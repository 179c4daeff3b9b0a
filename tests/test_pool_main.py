"""Pool: functions of the main program, TEMPLATE, and pools inside processes."""

from __future__ import annotations

import asyncio
import py_compile

import pytest

import afork

from .scripts.fault_tools import log  # noqa: F401 - a fixture

MAIN = """
import asyncio, os, sys
import afork

def double(x):
    return 2 * x

def items(n):
    yield from range(n)

class Error(Exception):
    pass

def fail():
    raise Error("mine")

async def later(x):
    await asyncio.sleep(0)
    return x

started = os.getpid()
{last}

async def main():
    async with afork.Pool({options}) as pool:
        assert await asyncio.gather(*map({name}, range(5))) == [0, 2, 4, 6, 8]
        {body}

{guard}
"""

CALL = "lambda x: pool.call(double, x)"
BODY = """
        assert [x async for x in pool.map(double, range(3))] == [0, 2, 4]
        assert [x async for x in pool.stream(items, 3)] == [0, 1, 2]
        try:
            await pool.call(fail)
        except Error as exc:
            assert exc.args == ("mine",)
        else:
            raise AssertionError
"""
GUARD = 'if __name__ == "__main__":\n    asyncio.run(main())\n    print("passed")'


def script(tmp_path, **parts):
    values = {"last": "", "options": "max=2", "name": CALL, "body": "pass"}
    path = tmp_path / "program.py"
    path.write_text(MAIN.format(**{**values, "guard": GUARD, **parts}))
    return path


def run_file(run_script, path, **kwargs):
    """As a user would: by its path."""
    code = "import os, sys\nos.execv(sys.executable, [sys.executable, '-W', 'error', "
    code += f"{str(path)!r}])"
    return run_script(code, **kwargs)


@pytest.mark.parametrize(
    "options",
    [
        "max=2",
        "max=2, template=afork.Fork.new()",
        "max=2, template=afork.Fork.new_exec()",
        "max=2, load=3, max_calls=2",
    ],
)
def test_functions_of_the_main_program(run_script, tmp_path, options):
    path = script(tmp_path, options=options, body=BODY)
    assert run_file(run_script, path).stdout == "passed\n"


def test_bound_to_a_function_of_the_main_program(run_script, tmp_path):
    path = script(tmp_path, options="double, max=2", name="pool")
    assert run_file(run_script, path).stdout == "passed\n"


def test_init_of_the_main_program(run_script, tmp_path):
    body = "assert await pool.call(double, started) == 2 * started"
    path = script(tmp_path, options="max=2, init=double, initargs=(1,)", body=body)
    assert run_file(run_script, path).stdout == "passed\n"


def test_the_template_of_the_main_program(run_script, tmp_path):
    """Forked with what the program has loaded: nothing is loaded again."""
    last = "print('once', flush=True)\nfrom afork.template import TEMPLATE\n"
    options = "max=2, template=TEMPLATE"
    path = script(tmp_path, last=last, options=options, body=BODY)
    assert run_file(run_script, path).stdout == "once\npassed\n"


def test_a_compiled_main_program(run_script, tmp_path):
    path = script(tmp_path, options="max=2", body=BODY)
    compiled = py_compile.compile(str(path), str(tmp_path / "compiled.pyc"))
    path.unlink()
    assert run_file(run_script, compiled).stdout == "passed\n"


def test_a_main_program_run_by_another(run_script, tmp_path):
    """As coverage and pdb do: __main__ is another module than at the start."""
    path = script(tmp_path, options="max=2", body=BODY)
    code = f"""
import multiprocessing, sys, types
main = sys.modules["__main__"] = types.ModuleType("__main__")
main.__file__ = {str(path)!r}
with open(main.__file__) as file:
    exec(compile(file.read(), main.__file__, "exec"), main.__dict__)
"""
    assert run_script(code).stdout == "passed\n"


@pytest.mark.parametrize("options", ["max=2", "double, max=2"])
def test_a_main_program_that_is_not_main(run_script, tmp_path, options):
    """As cProfile and trace run it."""
    name = "pool" if "double" in options else CALL
    path = script(tmp_path, options=options, name=name)
    code = f"import runpy\nrunpy._run_code(open({str(path)!r}).read(), {{}}, None, "
    done = run_script(code + "'__main__')", status=1)
    assert "put" in done.stderr.lower()
    assert "into a module that the program imports" in done.stderr


def test_without_the_guard(run_script, tmp_path):
    """A clear error, no fork bomb."""
    path = script(tmp_path, guard="asyncio.run(main())")
    done = run_file(run_script, path, status=1)
    assert "if __name__ ==" in done.stderr


def test_no_main_program(run_script):
    """python -c: nothing to load functions and classes from."""
    run_script(
        """
import asyncio, dataclasses
import afork

@dataclasses.dataclass
class Item:
    x: int

def double(x):
    return 2 * x

async def main():
    async with afork.Pool(max=1) as pool:
        for args in ((double, 1), (id, Item(1))):
            try:
                await pool.call(*args)
            except AttributeError as exc:
                (note,) = exc.__notes__
                assert "the main program cannot be loaded in the process" in note
            else:
                raise AssertionError
        assert await pool.call(abs, -5) == 5
    # A template that knows such a name itself.
    template = afork.Fork.new().eval("def double(x): return 3 * x")
    async with afork.Pool(max=1, template=template) as pool:
        assert await pool.call(double, 1) == 3

asyncio.run(main())
"""
    )


def test_multiprocessing_in_a_worker(run_script, tmp_path):
    last = """
import multiprocessing
try:
    from .nowhere import nothing
except (ImportError, ImportWarning):  # as programs do that may be of a package
    pass

def spawns(x):
    # Loads the main program once more, there.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(double, (x,))
"""
    body = "assert await pool.call(spawns, 3) == 6"
    path = script(tmp_path, last=last, body=body)
    assert run_file(run_script, path).stdout == "passed\n"


def test_end_of_the_program_with_a_pool(run_script, tmp_path):
    """Neither closed nor waited for: it ends, silently."""
    done = run_script(
        """
import asyncio, afork, math
async def main():
    global pool, call
    pool = afork.Pool(idle=1, max=2)
    await pool.call(math.factorial, 5)
    call = pool.call(math.factorial, 6)
asyncio.run(main())
print("passed")
"""
    )
    assert done.stdout == "passed\n"
    assert done.stderr == ""


def test_a_pool_inside_a_process(arun, jobs):
    async def main():
        async with afork.Pool(max=2) as pool:
            calls = [pool.call(jobs.run_nested, 20) for _ in range(3)]
            for result in await asyncio.gather(*calls):
                assert result == list(range(20))
            assert await pool.call(jobs.add, 1) == 1
        async with afork.Pool(jobs.nested, asynchronous=True, max=1) as pool:
            assert await pool(5) == list(range(5))

    arun(main)


def test_one_pool_for_each_run(jobs):
    template = afork.Fork.new().require("pool_jobs")

    async def main(i):
        async with afork.Pool(template=template, max=2) as pool:
            return await pool.call(jobs.add, i)

    assert [asyncio.run(main(i)) for i in range(3)] == [0, 1, 2]
