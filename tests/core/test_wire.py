"""The codec: BER numbers, string lists, headers, letters."""

import errno

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from .reference import (
    COMMANDS,
    REPORTS,
    TO_APPLICATION,
    TO_PROCESS,
    ProtocolError,
    frame,
    get_ber,
    get_list,
    put_ber,
    put_list,
)

bounded = settings(max_examples=500, deadline=None, database=None, print_blob=True)

NUMBERS = [
    (0, "00"),
    (1, "01"),
    (127, "7f"),
    (128, "8100"),
    (255, "817f"),
    (16383, "ff7f"),
    (16384, "818000"),
    (2**21 - 1, "ffff7f"),
    (2**21, "81808000"),
    (2**28 - 1, "ffffff7f"),
    (2**28, "8180808000"),
    (2**31, "8880808000"),
    (2**32 - 1, "8fffffff7f"),
]


def c_get_ber(ffi, lib, data: bytes):
    """Return (number, bytes used), or a negative error."""
    at = ffi.new("uint8_t[]", data or b"\0")
    number = ffi.new("uint32_t *")
    used = lib.afork_wire_get_ber(at, at + len(data), number)
    return (number[0], used) if used >= 0 else used


def c_put_ber(ffi, lib, number: int) -> bytes:
    at = ffi.new("uint8_t[8]", b"\xaa" * 8)
    used = lib.afork_wire_put_ber(at, number)
    assert used == lib.afork_wire_ber_size(number)
    written = bytes(at)
    assert written[used:] == b"\xaa" * (8 - used)
    return written[:used]


def c_get_list(ffi, lib, data: bytes):
    """Return the strings, or a negative error."""
    # Exactly as long as the data: the sanitizer sees a read behind it.
    memory = ffi.new("uint8_t[]", data) if data else ffi.NULL
    walk = ffi.new("struct afork_strs *", (memory, memory + len(data)))
    string = ffi.new("struct afork_str *")
    found = []
    while (r := lib.afork_wire_next(walk, string)) > 0:
        found.append(ffi.buffer(string.data, string.len)[:] if string.len else b"")
    return found if r == 0 else r


def c_put_list(ffi, lib, strings) -> bytes:
    keep = [ffi.new("uint8_t[]", s) for s in strings]
    array = ffi.new(
        "struct afork_str[]",
        [(k, len(s)) for k, s in zip(keep, strings, strict=True)],
    )
    size = lib.afork_wire_list_size(array, len(strings))
    memory = ffi.new("uint8_t[]", size + 1)
    memory[size] = 0xAA
    lib.afork_wire_put_list(memory, array, len(strings))
    assert memory[size] == 0xAA
    return ffi.buffer(memory, size)[:]


@pytest.mark.parametrize(("number", "text"), NUMBERS)
def test_ber_table(ffi, lib, number, text):
    data = bytes.fromhex(text)
    assert c_put_ber(ffi, lib, number) == data == put_ber(number)
    assert c_get_ber(ffi, lib, data) == (number, len(data))
    assert c_get_ber(ffi, lib, data + b"\xff") == (number, len(data))
    for cut in range(len(data)):
        assert c_get_ber(ffi, lib, data[:cut]) == -errno.EPROTO


@pytest.mark.parametrize(
    "text",
    [
        "",
        "80",
        "8000",  # 0 in two bytes
        "8001",
        "808080808001",
        "ff",
        "ffffffff",
        "ffffffffff",
        "9080808000",  # 2**32
        "ffffffff7f",  # 35 bits
        "818080808000",  # 2**35 in six bytes
        "8fffffffff7f",
    ],
)
def test_ber_refused(ffi, lib, text):
    data = bytes.fromhex(text)
    assert c_get_ber(ffi, lib, data) == -errno.EPROTO
    with pytest.raises(ProtocolError):
        get_ber(data)


@bounded
@given(st.integers(0, 2**32 - 1))
def test_ber_round_trip(ffi, lib, number):
    data = c_put_ber(ffi, lib, number)
    assert data == put_ber(number)
    assert c_get_ber(ffi, lib, data) == (number, len(data))


@bounded
@given(st.binary(max_size=8))
def test_ber_any_bytes(ffi, lib, data):
    try:
        expected = get_ber(data)
    except ProtocolError:
        expected = -errno.EPROTO
    assert c_get_ber(ffi, lib, data) == expected


@bounded
@given(st.lists(st.binary(max_size=300), max_size=20))
@example([])
@example([b""])
@example([b"", b"", b"x" * 127, b"x" * 128, b"x" * 16384])
def test_list_round_trip(ffi, lib, strings):
    data = c_put_list(ffi, lib, strings)
    assert data == put_list(strings)
    assert c_get_list(ffi, lib, data) == strings


@bounded
@given(st.binary(max_size=40))
@example(b"\x05abc")
@example(b"\x8f\xff\xff\xff\x7f")
def test_list_any_bytes(ffi, lib, data):
    try:
        expected = get_list(data)
    except ProtocolError:
        expected = -errno.EPROTO
    found = c_get_list(ffi, lib, data)
    assert found == expected
    if isinstance(found, list):  # one form only: what decodes is what encodes
        assert c_put_list(ffi, lib, found) == data


@bounded
@given(st.lists(st.binary(max_size=30), min_size=1, max_size=5), st.data())
def test_list_cut_short(ffi, lib, strings, data):
    whole = put_list(strings)
    cut = data.draw(st.integers(0, len(whole)))
    boundaries = {len(put_list(strings[:n])) for n in range(len(strings) + 1)}
    found = c_get_list(ffi, lib, whole[:cut])
    assert (found == -errno.EPROTO) == (cut not in boundaries)


def test_list_size_has_32_bits(ffi, lib):
    def size(*lengths):
        array = ffi.new("struct afork_str[]", [(ffi.NULL, n) for n in lengths])
        return lib.afork_wire_list_size(array, len(lengths))

    assert size(2**32 - 6) == 2**32 - 1
    assert size(2**32 - 5) == -errno.E2BIG
    assert size(2**32) == -errno.E2BIG
    assert size(2**64 - 1) == -errno.E2BIG
    assert size(2**31, 2**31) == -errno.E2BIG
    assert size(*[2**31] * 8) == -errno.E2BIG
    assert size() == 0


@pytest.mark.parametrize("length", [0, 1, 255, 256, 2**31, 2**32 - 1])
def test_head(ffi, lib, length):
    head = ffi.new("uint8_t[5]")
    lib.afork_wire_put_head(head, ord("e"), length)
    assert bytes(head)[:1] == b"e"
    assert lib.afork_wire_head_len(head) == length
    if length <= 256:
        assert bytes(head) + b"x" * length == frame(b"e", b"x" * length)


def test_letters(ffi, lib):
    for table, prefix in ((COMMANDS, "AFORK_CMD_"), (REPORTS, "AFORK_REP_")):
        assert len(set(table.values())) == len(table)
        for name, letter in table.items():
            assert getattr(lib, prefix + name) == ord(letter), name
    # Those of AnyEvent::Fork never change.
    seed = ["EVAL", "ARGS", "HANDLE", "FORK", "RUN"]
    assert b"".join(COMMANDS[name] for name in seed) == b"eahfr"


def test_where_descriptors_ride(lib):
    names = {lib.AFORK_CARRY_BEHIND: "behind", lib.AFORK_CARRY_FIRST: "first"}
    for direction, expected in (
        (lib.AFORK_TO_PROCESS, TO_PROCESS),
        (lib.AFORK_TO_APPLICATION, TO_APPLICATION),
    ):
        found = {n: lib.afork_wire_carry(direction, n) for n in range(256)}
        assert lib.AFORK_CARRY_NONE == 0
        assert {n: names[how] for n, how in found.items() if how} == expected
