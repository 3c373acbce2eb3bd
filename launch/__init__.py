"""Where runs start: this machine, Slurm, Kubernetes; and a look at the devices first."""
