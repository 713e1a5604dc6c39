"""The machine, and nothing of models: files, directories, memory, threads, signals and text formats."""
