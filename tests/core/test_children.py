"""Reaping: our children, all of them, and nobody else's.

Everything here forks, so it runs in interpreters of its own.
"""

import pytest

CHILDREN = """\
import signal

children = ffi.new("struct afork_children *")
lib.afork_children_init(children)
exits = ffi.new("struct shim_exit[500]")
release = {}

def child(how=0):
    '''Fork a child that ends when it is told to; how < 0 is by signal.'''
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        for other in w, *release.values():
            os.close(other)
        os.read(r, 1)
        if how < 0:
            os.kill(os.getpid(), -how)
        os._exit(how)
    os.close(r)
    release[pid] = w
    return pid

def ours(number, how=0):
    pid = child(how)
    assert lib.afork_children_reserve(children) == 0
    lib.afork_children_add(children, pid, number)
    return pid

def end(*pids):
    '''Let them end and wait until they are zombies.'''
    for pid in pids:
        os.close(release.pop(pid))
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

def reap():
    n = lib.shim_reap(children, exits, 500)
    return [(exits[i].pid, exits[i].id, exits[i].status) for i in range(n)]

def known():
    return [children.list[i].pid for i in range(children.n)]
"""


@pytest.fixture
def run(script):
    def run(source):
        import textwrap

        # The end of each: nothing is left, and nothing is leaked.
        tail = "lib.afork_children_free(children)\n"
        return script(CHILDREN + textwrap.dedent(source) + tail)

    return run


def test_status(run):
    run(
        """
        a, b, c = ours(1), ours(2, 77), ours(3, -signal.SIGKILL)
        assert reap() == []
        end(b)
        assert reap() == [(b, 2, 77 << 8)]
        end(c, a)
        assert sorted(reap()) == sorted([(a, 1, 0), (c, 3, signal.SIGKILL)])
        assert reap() == [] and known() == []
        """
    )


def test_rusage(run):
    run(
        """
        pid = ours(1)
        end(pid)
        reap()
        assert exits[0].has_usage
        assert exits[0].max_rss > 1000  # kB, a Python
        assert 0 <= exits[0].cpu_usec < 60_000_000
        """
    )


def test_ids_have_64_bits(run):
    run(
        """
        pid = ours(2**64 - 1)
        end(pid)
        assert reap() == [(pid, 2**64 - 1, 0)]
        """
    )


def test_strangers_zombie_in_front(run):
    """A child of evaluated code is not ours to reap, and hides nothing."""
    run(
        """
        stranger = child(5)
        end(stranger)
        a, b, c = ours(1, 1), ours(2, 2), ours(3, 3)
        assert reap() == []
        end(c)
        assert reap() == [(c, 3, 3 << 8)]
        end(a)
        assert reap() == [(a, 1, 1 << 8)]
        assert reap() == [] and known() == [b]
        other = child(6)
        end(other, b)
        assert reap() == [(b, 2, 2 << 8)]
        assert os.waitpid(stranger, 0)[1] == 5 << 8
        assert os.waitpid(other, 0)[1] == 6 << 8
        """
    )


def test_stolen(run):
    """Evaluated code waited for ours: the status is -1, with no usage."""
    run(
        """
        a, b = ours(1, 1), ours(2, 2)
        end(a)
        assert os.waitpid(-1, 0)[0] == a
        end(b)
        assert sorted(reap()) == sorted([(a, 1, -1), (b, 2, 2 << 8)])
        assert known() == []
        a, b = ours(1, 1), ours(2, 2)
        end(a, b)
        for _ in a, b:
            os.wait()
        assert sorted(reap()) == sorted([(a, 1, -1), (b, 2, -1)])
        assert not exits[0].has_usage
        """
    )


def test_stolen_while_a_stranger_is_in_front(run):
    run(
        """
        stranger = child(5)
        a = ours(1)
        end(stranger, a)
        os.waitpid(a, 0)
        assert reap() == [(a, 1, -1)]
        os.waitpid(stranger, 0)
        """
    )


def test_ignored_chld(run):
    """With CHLD ignored the kernel reaps: ours are gone like stolen ones."""
    run(
        """
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        a = ours(1, 1)
        os.close(release.pop(a))
        try:
            os.waitpid(a, 0)
        except ChildProcessError:
            pass
        assert reap() == [(a, 1, -1)]
        """
    )


def test_stopped_is_not_ended(run):
    run(
        """
        a = ours(1)
        os.kill(a, signal.SIGSTOP)
        os.waitid(os.P_PID, a, os.WSTOPPED | os.WNOWAIT)
        assert reap() == [] and known() == [a]
        os.kill(a, signal.SIGKILL)
        end(a)
        assert reap() == [(a, 1, signal.SIGKILL)]
        """
    )


def test_many_in_any_order(run):
    """More than one allocation, added and removed all over the table."""
    run(
        """
        import random
        seed = random.randrange(2**32)
        print("seed", seed)
        random.seed(seed)
        pids = {ours(number, number % 7): number for number in range(1, 151)}
        assert known() == sorted(pids)
        order = list(pids)
        random.shuffle(order)
        while order:
            n = random.randint(1, 40)
            part, order = order[:n], order[n:]
            end(*part)
            expected = [(p, pids[p], pids[p] % 7 << 8) for p in part]
            assert sorted(reap()) == sorted(expected), seed
            assert known() == sorted(order), seed
        """
    )


def test_lent_list_is_outgrown(ffi, lib):
    c = ffi.new("struct afork_children *")
    lent = ffi.new("struct afork_child[]", 4)
    lib.afork_children_init(c)
    lib.afork_children_lend(c, lent, 4)
    for pid in range(9, 0, -1):
        assert lib.afork_children_reserve(c) == 0
        lib.afork_children_add(c, pid, pid * 2)
        assert (c.list == lent) is (c.n <= 4)
    assert [(c.list[i].pid, c.list[i].id) for i in range(9)] == [
        (pid, pid * 2) for pid in range(1, 10)
    ]
    lib.afork_children_free(c)
    assert c.list == ffi.NULL


def test_table_order(ffi, lib):
    """Pids wrap around: a later child may sort first."""
    children = ffi.new("struct afork_children *")
    lib.afork_children_init(children)
    for pid in (500, 100, 900, 300, 700, 200):
        assert lib.afork_children_reserve(children) == 0
        lib.afork_children_add(children, pid, pid * 10)
    found = [(children.list[i].pid, children.list[i].id) for i in range(children.n)]
    assert found == [(p, p * 10) for p in (100, 200, 300, 500, 700, 900)]
    lib.afork_children_free(children)


def test_no_memory(ffi, lib):
    children = ffi.new("struct afork_children *")
    lib.afork_children_init(children)
    lib.shim.alloc_fail_at = 1
    assert lib.afork_children_reserve(children) < 0
    assert lib.afork_children_reserve(children) == 0
    assert children.n == 0
    lib.afork_children_free(children)
