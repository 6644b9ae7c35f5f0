"""Which hook sums what."""

from dpoptim import comm_hooks
from dpoptim.daso import phase_hook
from dpoptim.daso.phase_hook import PhaseHook


def test_a_node_sums_plainly_and_all_ranks_by_the_users_hook(monkeypatch):
    monkeypatch.setattr(phase_hook, "allreduce", lambda *args: ("plainly", *args))
    hook = PhaseHook(lambda *args: ("by the user's", *args))
    assert hook("all ranks", "a bucket") == ("by the user's", "all ranks", "a bucket")
    hook.node = "the node"
    assert hook("the node", "a bucket") == ("plainly", "the node", "a bucket")
    assert hook("all ranks", "a bucket") == ("by the user's", "all ranks", "a bucket")


def test_it_scales_and_defers_as_the_users_hook_does():
    for hook in (comm_hooks.allreduce, comm_hooks.bf16_compress, print):
        for name in ("scales", "defers"):
            assert getattr(PhaseHook(hook), name) == getattr(hook, name, False)
