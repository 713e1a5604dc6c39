"""Open what a user names as a source, and read its tensors: directories, pickles, adapters, OpenAI's files."""
