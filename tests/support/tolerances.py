"""Every numeric tolerance of the tests by name, and why it is that large. All are relative unless said otherwise."""

EXACT = 0.0  # the same numbers in the same order
ROUNDING = 1e-10  # float64 sums and products of small, well-conditioned matrices
ROOT_OF_ROUNDING = 1e-6  # a singular value taken from a Gram matrix: the root of a rounding error of the largest one
ITERATIVE = 1e-6  # an oracle that is itself an iteration, stopped early
TIE = 1e-12  # absolute: nats between two sums that differ only in the order of their terms

FLOAT32 = 2e-5  # float32 sums of some ten to a hundred terms
BFLOAT16 = 4e-2  # two bfloat16 products one after the other, 8 bits of mantissa each
FACTOR_CAST = {"float64": ROUNDING, "float32": FLOAT32, "bfloat16": BFLOAT16}  # by the dtype that factors are cast to
LIBRARIES = 1e-9  # whole float64 models on another processor or another torch: a few hundred sums one after the other
