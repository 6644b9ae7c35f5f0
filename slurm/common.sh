# Sourced by the batch scripts: threads of a rank from what SLURM gives, and `launch COMMAND...` on all ranks.
#
#   DPOPTIM_MPI     openmpi: its own mpirun, which finds SLURM's nodes; mpich: srun --mpi=pmi2. By default mpich where
#                   `mpirun` is MPICH's, else openmpi.
#   DPOPTIM_SETUP   a file to source on the first node, such as `module load ...` and the virtual environment.

if [ -n "${DPOPTIM_SETUP:-}" ]; then source "$DPOPTIM_SETUP"; fi
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not take --cpus-per-task over by itself

if [ -z "${DPOPTIM_MPI:-}" ]; then
    if mpirun --version 2>/dev/null | grep -qi hydra; then DPOPTIM_MPI=mpich; else DPOPTIM_MPI=openmpi; fi
fi

launch() {
    if [ "$DPOPTIM_MPI" = mpich ]; then
        exec_or_run srun --mpi=pmi2 --cpu-bind=cores "$@"
    else
        # "slot" counts tasks of the node; PE binds each rank to as many cores as it has threads.
        exec_or_run mpirun --map-by "slot:PE=${SLURM_CPUS_PER_TASK:-1}${DPOPTIM_MAP_BY:-}" "$@"
    fi
}

# In the background the launcher takes the subshell's place, so that signals to it reach the launcher itself.
exec_or_run() { if [ "$BASHPID" != "$$" ]; then exec "$@"; else "$@"; fi; }
