"""The machine, independent of models: files, directories, memory, threads, signals and text formats."""
