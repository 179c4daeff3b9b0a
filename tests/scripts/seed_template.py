"""The original's 02_template: the program so far, as a template."""

import asyncio

prepared = "prepared"

from afork.template import TEMPLATE  # noqa: E402

prepared = "too late"


async def main() -> None:
    # 1: there it is
    assert TEMPLATE is not None
    async with asyncio.timeout(10):
        # 2, 3: buffered output appears, and our end tells when it ends
        sock = await TEMPLATE.to_fh(plain=True)
        import afork

        loop = asyncio.get_running_loop()
        template = afork.Fork.new_from_fh(sock.dup(), plain=True)
        child = template.fork()
        template.eval("print('ok from the process,', prepared); raise SystemExit")
        del template
        assert await loop.sock_recv(sock, 1) == b""
        sock.close()
        assert await TEMPLATE.wait() == 0

        # Its child has not held our end's peer open, and lives on.
        child.eval("def answer(sock): sock.sendall(prepared.encode())")
        sock = await child.run("answer")
        assert await loop.sock_recv(sock, 99) == b"prepared"
        sock.close()
    print("ok from the application,", prepared)


asyncio.run(main())
