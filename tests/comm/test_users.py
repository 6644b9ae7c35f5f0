"""Users of a communicator: it is freed when it is an orphan and the last one is gone, and not before."""

import pytest

from dpoptim.comm.users import Users


@pytest.mark.parametrize("is_orphan_first", [True, False])
def test_an_orphan_is_freed_with_its_last_user(is_orphan_first):
    freed, users = [], Users()
    for _ in range(2):
        users.add()
    if is_orphan_first:
        users.orphan(lambda: freed.append("now"))
    users.remove()
    assert not freed
    users.remove()
    assert bool(freed) == is_orphan_first
    if not is_orphan_first:
        users.orphan(lambda: freed.append("now"))
    assert freed == ["now"]


def test_who_wants_to_know_is_told_once():
    told, users = [], Users()
    users.when_freed(lambda: told.append(1))
    users.tell_freed()
    users.tell_freed()
    assert told == [1]
