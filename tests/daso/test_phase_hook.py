"""Which hook sums what."""

from dpoptim.daso import phase_hook
from dpoptim.daso.phase_hook import PhaseHook


def test_a_node_sums_plainly_and_all_ranks_by_the_users_hook(monkeypatch):
    monkeypatch.setattr(phase_hook, "allreduce", lambda *args: ("plainly", *args))
    hook = PhaseHook(lambda *args: ("by the user's", *args))
    assert hook("all ranks", "a bucket") == ("by the user's", "all ranks", "a bucket")
    hook.node = "the node"
    assert hook("the node", "a bucket") == ("plainly", "the node", "a bucket")
    assert hook("all ranks", "a bucket") == ("by the user's", "all ranks", "a bucket")
