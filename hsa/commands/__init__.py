"""The commands of `hsa`, one module each: parse, call, print. None decides what a library function could."""
