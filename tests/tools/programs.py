"""What the programs find in their environment that tests start."""

from pathlib import Path

__all__ = ["ENVIRONMENT", "OPEN_MPI_DIRECTORY", "QUICK_START"]

# Open MPI wants to be told that root and more ranks than cores are meant. Python is not to write each part of a line by
# itself, whatever the caller's environment says: the lines of several ranks would be mixed.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    **{f"{prefix}_ALLOW_RUN_AS_ROOT{suffix}": "1" for prefix in ("OMPI", "PRTE") for suffix in ("", "_CONFIRM")},
}
# Where Open MPI has the files of the memory that ranks share.
OPEN_MPI_DIRECTORY = "OMPI_MCA_btl_sm_backing_directory"
QUICK_START = {"PYTHONPATH": str(Path(__file__).parent / "startup")}
