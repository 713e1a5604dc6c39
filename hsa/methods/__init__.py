"""What a merge computes: its parameters, the selection of heads, and the sums behind it."""
