"""Everything that is to be checked and measured on a GPU, in two parts of a few minutes each."""
