"""The original's 01_early: a template forked before anything else is loaded."""

import afork.early  # noqa: I001

import asyncio

import afork._default

assert "asyncio" not in afork.early.__dict__


async def main() -> None:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        # 1: both kinds of new processes come from Early's one template
        early = afork._default.early_template()
        assert early is not None
        assert afork.Fork.default()._process is early
        for f in (afork.Fork.new(), afork.Fork.new_exec()):
            f.eval(
                """
                def parent(sock):
                    import os, sys
                    loaded = "asyncio" in sys.modules
                    sock.sendall(b"%d %d" % (os.getppid(), loaded))
                """
            )
            sock = await f.run("parent")
            assert await loop.sock_recv(sock, 99) == b"%d 0" % early.pid
            sock.close()

        # 2, 3: its output is ours, and our end tells when it ends
        f = afork.Fork.new_exec()
        sock = await f.to_fh(plain=True)
        afork.Fork.new_from_fh(sock.dup(), plain=True).eval(
            """
            import os
            os.write(1, b"ok from the process\\n")
            os._exit(0)
            """
        )
        assert await loop.sock_recv(sock, 1) == b""
        sock.close()
        print("ok from the application")


asyncio.run(main())
