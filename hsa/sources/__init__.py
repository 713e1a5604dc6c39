"""From what a user names to tensors that can be read: directories, pickles, adapters, OpenAI's files."""
