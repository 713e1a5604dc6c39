"""Whether an output, a patch, a sweep or a release is what it says it is."""
