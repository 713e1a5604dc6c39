"""Other programs' ways in: each module is thin, optional, and imported by nothing else."""
