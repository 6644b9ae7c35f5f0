"""An abort waits until the launcher has read why."""

import os
import threading
import time

from dpoptim.comm.errors import _wait_until_read


def test_what_was_printed_is_read_before_the_abort():
    reader, writer = os.pipe()
    read = []

    def read_late():
        time.sleep(0.2)
        read.append(os.read(reader, 100))

    thread = threading.Thread(target=read_late)
    thread.start()
    with os.fdopen(writer, "w") as stream:
        stream.write("KeyError: 'lost file'")
        _wait_until_read(stream)
        assert read == [b"KeyError: 'lost file'"]
        thread.join()
    os.close(reader)


def test_a_reader_that_never_comes_delays_the_abort_only_shortly():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        stream.write("nobody reads this")
        _wait_until_read(stream, limit_s=0.05)
    assert os.read(reader, 100) == b"nobody reads this"
    os.close(reader)


def test_a_closed_stream_is_no_error(tmp_path):
    stream = (tmp_path / "log").open("w")
    stream.close()
    _wait_until_read(stream)
