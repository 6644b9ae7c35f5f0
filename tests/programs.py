"""What the programs find in their environment that tests start."""

from pathlib import Path

__all__ = ["ENVIRONMENT", "QUICK_START"]

# Open MPI wants to be told that root and more ranks than cores are meant.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    **{f"{prefix}_ALLOW_RUN_AS_ROOT{suffix}": "1" for prefix in ("OMPI", "PRTE") for suffix in ("", "_CONFIRM")},
}
QUICK_START = {"PYTHONPATH": str(Path(__file__).parent / "startup")}
