"""Starting programs: what they get, and what is said when they do not start."""

import contextlib
import os
import signal
import subprocess

import pytest

SPAWN = """\
import errno, fcntl, signal

def exec_of(argv, search=None, env=(), cwd=None, fds=(), **fields):
    texts = [ffi.new("char[]", os.fsencode(a)) for a in argv]
    environ = [ffi.new("char[]", os.fsencode(e)) for e in env]
    pairs = ffi.new("struct afork_fdmap[]", [list(pair) for pair in fds])
    program = fields.pop("program", argv[0] if argv else "")
    keep = {
        "program": ffi.new("char[]", os.fsencode(program)),
        "argv": ffi.new("char *[]", [*texts, ffi.NULL]),
        "envp": ffi.new("char *[]", [*environ, ffi.NULL]),
        "search": ffi.NULL if search is None else ffi.new("char[]", os.fsencode(search)),
        "cwd": ffi.NULL if cwd is None else ffi.new("char[]", os.fsencode(cwd)),
        "fds": pairs,
        "nfds": len(fds),
        **{"cwd_fd": -1, "mask": -1, "group": -1, **fields},
    }
    x = ffi.new("struct afork_exec *", keep)
    keep["strings"] = texts, environ
    return x, keep

def spawn(argv, **fields):
    '''Return the pid, or (-errno, stage).'''
    x, keep = exec_of(argv, **fields)
    stage = ffi.new("enum afork_stage *")
    pid = lib.afork_spawn(x, stage)
    name = ffi.string(lib.afork_stage_name(stage[0])).decode()
    assert (name == "") == (pid > 0)
    return pid if pid > 0 else (errno.errorcode[-pid], name)

def probe(*args, **fields):
    '''Return what `probe dump` saw: {"fd": {number: target}, "cwd": ...}.'''
    r, w = os.pipe()
    fds = [*fields.pop("fds", ()), (w, 1)]
    pid = spawn([PROBE, "dump", *args], fds=fds, **fields)
    os.close(w)
    if isinstance(pid, tuple):
        os.close(r)
        return pid
    with open(r) as pipe:
        lines = pipe.read().splitlines()
    assert os.waitpid(pid, 0)[1] == 0
    seen = {"pid": pid, "fd": {}, "arg": [], "env": []}
    for line in lines:
        key, _, value = line.partition(" ")
        if key == "fd":
            number, _, target = value.partition(" ")
            seen["fd"][int(number)] = target
        elif key in ("arg", "env"):
            seen[key].append(value)
        elif key.startswith("Sig"):
            seen[line[:6]] = int(line.split()[1], 16)
        else:
            seen[key] = value
    assert seen["fd"].pop(1).startswith("pipe:")
    return seen

def target(fd):
    return os.readlink(f"/proc/self/fd/{fd}")

def no_children():
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False
"""


@pytest.fixture
def run(script, probe):
    def run(source, **more):
        import textwrap

        head = f"PROBE = {probe!r}\n" + SPAWN
        tail = "assert no_children()\n"
        return script(head + textwrap.dedent(source) + tail, **more)

    return run


@pytest.fixture
def folder(tmp_path):
    """A folder of things that cannot be executed."""

    def make(name, text, mode):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)

    make("plain", "", 0o644)
    make("no-interpreter", "#!/nonexistent/interpreter\n", 0o755)
    make("garbage", "this is no program\n", 0o755)
    (tmp_path / "dir").mkdir()
    return tmp_path


def test_failures(run, folder):
    """Each with errno and stage, and with the child reaped already."""
    run(
        f"""
        folder = {str(folder)!r}
        for argv, expected in [
            ([folder + "/missing"], ("ENOENT", "exec")),
            ([folder + "/plain/x"], ("ENOTDIR", "exec")),
            ([folder + "/plain"], ("EACCES", "exec")),
            ([folder + "/dir"], ("EACCES", "exec")),
            ([folder + "/no-interpreter"], ("ENOENT", "exec")),
            ([folder + "/garbage"], ("ENOEXEC", "exec")),
            (["", "x"], ("ENOENT", "exec")),
            (["/" * 5000], ("ENAMETOOLONG", "exec")),
            ([PROBE, "x" * (1 << 20)], ("E2BIG", "exec")),
        ]:
            assert spawn(argv) == expected, argv
            assert no_children()
        for fields, expected in [
            ({{"cwd": folder + "/missing"}}, ("ENOENT", "cwd")),
            ({{"cwd": folder + "/plain"}}, ("ENOTDIR", "cwd")),
            ({{"cwd_fd": 0}}, ("ENOTDIR", "cwd")),
            ({{"cwd_fd": 99}}, ("EBADF", "cwd")),
            ({{"fds": [(99, 0)]}}, ("EBADF", "setup")),
            ({{"fds": [(-1, 0)]}}, ("EBADF", "setup")),
            ({{"fds": [(0, 1 << 30)]}}, ("EINVAL", "setup")),
            ({{"fds": [(0, 2**31 - 1)]}}, ("EBADF", "setup")),
            ({{"group": 2**31 - 1}}, ("EPERM", "setup")),
            ({{"deathsig": 9999}}, ("EINVAL", "setup")),
            ({{"deathsig": 9, "parent": os.getpid() + 1}}, ("ESRCH", "setup")),
        ]:
            assert spawn([PROBE, "dump"], **fields) == expected, fields
            assert no_children()
        """,
        stdin=subprocess.DEVNULL,
    )


def test_no_pipe_and_no_process(run):
    run(
        """
        import resource
        lowest = os.dup(0)
        os.close(lowest)
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        for spare in 0, 1:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + spare, hard))
            assert spawn([PROBE, "dump"]) == ("EMFILE", "fork")
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 9, hard))
        assert os.dup(0) == lowest
        """
    )


@pytest.mark.parametrize("old_kernel", [0, 1])
def test_golden(run, old_kernel):
    """T14: 50 dirty descriptors, ignored, caught and blocked signals."""
    run(
        f"""
        lib.shim.no_close_range = {old_kernel}
        for number in range(3, 50):
            try:
                os.set_inheritable(os.dup2(0, number), True)
            except OSError:
                pass
        for number in 100, 200, 300:
            fcntl.fcntl(0, fcntl.F_DUPFD, number)
        dirty = os.listdir("/proc/self/fd")
        assert len(dirty) >= 50
        os.umask(0o27)
        for sig in signal.SIGPIPE, signal.SIGINT, signal.SIGUSR1, 40:
            signal.signal(sig, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, lambda *a: None)
        signal.signal(signal.SIGCHLD, lambda *a: None)
        blocked = {{signal.SIGTERM, signal.SIGUSR2, signal.SIGCHLD, 41}}
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

        seen = probe("a b", "", fds=[(0, 5)], env=["A=1", "B=x y"])
        assert seen["fd"] == {{0: target(0), 2: target(2), 5: target(0)}}
        assert seen["SigBlk"] == seen["SigIgn"] == seen["SigCgt"] == 0
        assert seen["SigPnd"] == 0
        assert seen["arg"] == [PROBE, "dump", "a b", ""]
        assert seen["env"] == ["A=1", "B=x y"]
        assert seen["umask"] == "27"
        assert seen["cwd"] == os.getcwd()
        assert seen["deathsig"] == "0"
        ids = [int(n) for n in seen["ids"].split()]
        assert ids == [seen["pid"], os.getpid(), os.getpgid(0), os.getsid(0)]
        # Nothing changed here.
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == blocked
        assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
        assert callable(signal.getsignal(signal.SIGHUP))
        assert os.listdir("/proc/self/fd") == dirty
        assert os.umask(0) == 0o27
        """
    )


def test_descriptor_maps(run):
    """Swaps and chains: no order of the map overwrites one before its use."""
    run(
        """
        files = {}
        for number in 0, 3, 4, 5, 6:
            fd = os.memfd_create(f"file{number}")
            os.dup2(fd, number)
            if fd not in (0, 3, 4, 5, 6):
                os.close(fd)
        name = {n: target(n) for n in (0, 3, 4, 5, 6)}
        assert len(set(name.values())) == 5
        err = target(2)
        for fds in [
            [(3, 4), (4, 3)],
            [(4, 3), (3, 4)],
            [(3, 0), (0, 3)],
            [(3, 2), (2, 3)],
            [(3, 4), (4, 5), (5, 6), (6, 3)],
            [(6, 5), (5, 4), (4, 3)],
            [(3, 3)],
            [(0, 0), (3, 9), (3, 10), (3, 3)],
            [(5, 100), (4, 101), (0, 102)],
            [],
        ]:
            seen = probe(fds=fds)
            expected = {0: name[0], 2: err}
            for old, new in fds:
                expected[new] = err if old == 2 else name[old]
            assert seen["fd"] == expected, fds
            # they were borrowed
            assert {n: target(n) for n in name} == name
        """
    )


def test_null_device(run):
    run(
        """
        for closed in (), (0,), (0, 2):
            for fd in closed:
                os.close(fd)
            null = lib.AFORK_NULLFD
            seen = probe(fds=[(null, 0), (null, 2), (null, 8)])
            assert seen["fd"] == {n: "/dev/null" for n in (0, 2, 8)}
            if closed:
                os.open("/dev/zero", os.O_RDWR)
                os.dup2(0, 2)
        """
    )


def test_stdout_and_stdin_swapped(run):
    run(
        """
        (r, w), (r2, w2) = os.pipe(), os.pipe()
        before = target(0), target(1)
        x, keep = exec_of([PROBE, "dump"], fds=[(0, 1), (1, 0)])
        saved = os.dup(0), os.dup(1)
        os.dup2(w, 0)
        os.dup2(r2, 1)
        stage = ffi.new("enum afork_stage *")
        pid = lib.afork_spawn(x, stage)
        os.dup2(saved[0], 0)
        os.dup2(saved[1], 1)
        os.close(w)
        os.close(w2)
        os.waitpid(pid, 0)
        lines = os.read(r, 65536).decode().splitlines()
        assert f"fd 0 {target(r2)}" in lines and f"fd 1 {target(r)}" in lines
        assert (target(0), target(1)) == before
        """,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("closed", [(0,), (1, 2), (0, 1, 2)])
def test_with_stdio_closed(run, closed, tmp_path):
    """The status pipe may get a number that is a target of the map."""
    run(
        f"""
        out = os.open({str(tmp_path / "out")!r}, os.O_CREAT | os.O_WRONLY)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in {closed!r}:
            os.close(fd)
        everywhere = [(null, 0), (out, 1), (null, 2), (null, 3)]
        pid = spawn([PROBE, "dump"], fds=everywhere)
        assert os.waitpid(pid, 0)[1] == 0
        assert spawn(["/nonexistent"], fds=everywhere) == ("ENOENT", "exec")
        """
    )
    lines = (tmp_path / "out").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("fd")] == list("0123")


def test_place(run, tmp_path):
    """Directory, umask, session and process group."""
    (tmp_path / "sub").mkdir()
    run(
        f"""
        folder = os.path.realpath({str(tmp_path)!r})
        seen = probe(cwd=folder, mask=0o777, session=1)
        assert seen["cwd"] == folder and seen["umask"] == "777"
        pid, _, group, session = [int(n) for n in seen["ids"].split()]
        assert pid == group == session

        fd = os.open(folder, os.O_RDONLY)
        assert probe(cwd_fd=fd)["cwd"] == folder
        assert probe(cwd_fd=fd, cwd="sub")["cwd"] == folder + "/sub"
        assert probe(cwd_fd=fd)["fd"] == {{0: target(0), 2: target(2)}}

        pid, _, group, session = [int(n) for n in probe(group=0)["ids"].split()]
        assert pid == group and session == os.getsid(0)
        leader = spawn([PROBE, "hold"], group=0, fds=[(os.pipe()[0], 0)])
        assert probe(group=leader)["ids"].split()[2] == str(leader)
        os.kill(leader, signal.SIGKILL)
        os.waitpid(leader, 0)
        # A session leader has a group already.
        assert spawn([PROBE], session=1, group=0) == ("EPERM", "setup")
        """
    )


def test_path_search(run, tmp_path, probe):
    """As execvpe and CPython: the first that starts; a real reason wins."""
    for name in ("a", "b", "c", "dir"):
        (tmp_path / name).mkdir()
    os.symlink(probe, tmp_path / "b" / "prog")
    os.symlink("/bin/false", tmp_path / "c" / "prog")
    (tmp_path / "a" / "prog").write_text("")  # not executable
    (tmp_path / "a" / "other").write_text("garbage")
    (tmp_path / "a" / "other").chmod(0o755)
    (tmp_path / "a" / "mixed").write_text("")  # EACCES
    (tmp_path / "b" / "mixed").write_text("garbage")  # ENOEXEC
    (tmp_path / "b" / "mixed").chmod(0o755)
    (tmp_path / "file").write_text("")
    run(
        f"""
        os.chdir({str(tmp_path)!r})
        here = os.getcwd()

        def started(search, name="prog", **fields):
            r, w = os.pipe()
            argv = [name, "dump"]
            pid = spawn(argv, search=search, fds=[(w, 1)], **fields)
            os.close(w)
            with open(r) as pipe:
                lines = pipe.read()
            if isinstance(pid, tuple):
                return pid
            os.waitpid(pid, 0)
            return "arg prog" in lines

        assert started(here + "/b:" + here + "/c") is True
        assert started(here + "/c:" + here + "/b") is False  # the first one
        assert started("/nonexistent:" + here + "/file:" + here + "/b") is True
        assert started(here + "/a:" + here + "/b") is True
        assert started(here + "/a:/nonexistent") == ("EACCES", "exec")
        assert started("/nonexistent:" + here + "/a") == ("EACCES", "exec")
        assert started("/nonexistent:/also") == ("ENOENT", "exec")
        assert started(here + "/file") == ("ENOENT", "exec")
        assert started(here + "/a", "other") == ("ENOEXEC", "exec")
        # The first reason is the one that is told.
        assert started(here + "/a:" + here + "/b", "mixed") == ("EACCES", "exec")
        assert started(here + "/b:" + here + "/a", "mixed") == ("ENOEXEC", "exec")
        # An empty entry is the directory of the new program.
        for search in "", ":/nonexistent", "/nonexistent:", "/x::/y":
            assert started(search) == ("ENOENT", "exec")
            assert started(search, cwd="b") is True
        assert started("b") is True  # relative
        assert started("/" + "x" * 5000 + ":" + here + "/b") is True
        # A slash is not searched for, an empty name not at all.
        assert started(here, "b/../prog") == ("ENOENT", "exec")
        assert spawn([""], search=here) == ("ENOENT", "exec")
        # Without a path it is a file of the working directory.
        assert started(None) == ("ENOENT", "exec")
        assert started(None, cwd="b") is True
        # argv[0] is free.
        assert probe("x")["arg"][1:] == ["dump", "x"]
        r, w = os.pipe()
        pid = spawn(["name", "dump"], program=PROBE, fds=[(w, 1)])
        os.close(w)
        assert "arg name\\n" in open(r).read()
        os.waitpid(pid, 0)
        """
    )


def test_status_of_programs(run):
    run(
        """
        pid = spawn([PROBE, "exit", "7"])
        assert os.waitpid(pid, 0)[1] == 7 << 8
        pid = spawn([PROBE, "kill", "9"])
        assert os.waitpid(pid, 0)[1] == 9
        """
    )


def test_deathsig(run):
    """The program dies with its parent: its end of the pipe closes."""
    run(
        """
        r, w = os.pipe()
        inner, outer = os.pipe()
        middle = os.fork()
        if middle == 0:
            os.close(r)
            os.close(outer)
            hold, _ = os.pipe()
            pid = spawn(
                [PROBE, "hold"],
                fds=[(hold, 0), (w, 1)],
                deathsig=signal.SIGKILL,
                parent=os.getpid(),
            )
            assert pid > 0
            os.read(inner, 1)
            os._exit(0)
        os.close(w)
        assert probe(deathsig=15, parent=os.getpid())["deathsig"] == "15"
        os.close(outer)
        os.waitpid(middle, 0)
        assert os.read(r, 1) == b""
        """
    )


def test_exec_self(run, tmp_path):
    """The process becomes the program, with the same promises."""
    out = run(
        f"""
        spare = os.memfd_create("spare")
        os.set_inheritable(spare, True)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        x, keep = exec_of(
            [PROBE, "dump", str(os.getpid())], fds=[(spare, 7)], cwd={str(tmp_path)!r}
        )
        status, stage = ffi.new("int *", -1), ffi.new("enum afork_stage *")
        lib.afork_exec_self(x, status, stage)
        print("not reached")
        """
    )
    lines = out.splitlines()
    fds = [int(line.split()[1]) for line in lines if line.startswith("fd ")]
    assert sorted(fds) == [0, 1, 2, 7]
    for kind in ("SigBlk", "SigIgn", "SigCgt"):
        (line,) = [x for x in lines if x.startswith(kind)]
        assert int(line.split()[1], 16) == 0
    assert f"cwd {tmp_path}" in lines
    (pid,) = [x.split()[1] for x in lines if x.startswith("ids")]
    assert f"arg {pid}" in lines


def test_exec_self_fails(run):
    """The descriptor for the answer survives, wherever it was."""
    run(
        """
        for number in 4, 5, 20:
            answer = os.memfd_create("answer")
            os.dup2(fcntl.fcntl(answer, fcntl.F_DUPFD, 30), number, inheritable=False)
            null = os.open("/dev/null", os.O_RDONLY)
            x, keep = exec_of(["/nonexistent"], fds=[(null, number), (null, 6)])
            status = ffi.new("int *", number)
            stage = ffi.new("enum afork_stage *")
            assert lib.afork_exec_self(x, status, stage) == -errno.ENOENT
            assert stage[0] == lib.AFORK_STAGE_EXEC
            assert "answer" in target(status[0])
            assert not os.get_inheritable(status[0])
            assert target(number) == "/dev/null"
        """
    )


def test_many_at_once(run):
    run(
        """
        pids = [spawn([PROBE, "exit", str(n)]) for n in range(50)]
        assert len(set(pids)) == 50
        for n, pid in enumerate(pids):
            assert os.waitpid(pid, 0)[1] == n << 8
        """
    )


def test_helper_is_not_vacuous(probe):
    """The probe sees what a careless start passes on."""
    r, w = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, r)
        done = subprocess.run(
            [probe, "dump"],
            pass_fds=[w],
            stdout=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),
            check=True,
            timeout=20,
        )
        os.close(w)
    lines = done.stdout.decode().splitlines()
    assert any(line.startswith(f"fd {w} pipe:") for line in lines)
    (line,) = [x for x in lines if x.startswith("SigIgn")]
    assert int(line.split()[1], 16) & 1 << signal.SIGUSR1 - 1
