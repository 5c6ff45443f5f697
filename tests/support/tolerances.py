"""Every numeric tolerance of the tests by name, and what limits it. All are relative unless said otherwise.

Those for float64 leave a factor of 100 over the largest deviation under `make test-portable`, given behind "≤".
Those for narrower types guard against rounding to the next narrower one, and leave less.
"""

# The same operation on operands of the same values, shapes, strides and types, on the same number of threads: the same
# kernel, so the same bits. (Fresh tensors are aligned alike; those that lie in a mapped file are not.)
EXACT = 0.0

# float64 ------------------------------------------------------------------------------------------------------------

ROUNDING = 1e-10  # some hundred terms, and matrices of a condition up to 1e4, each 2e-16: ≤ 1e-12
ROOT_OF_ROUNDING = 1e-6  # a singular value taken from a Gram matrix: the root of a rounding error of the largest one
ALMOST_NO_RIDGE = 1e-9  # a bias, not rounding: a ridge of 1e-13 times the condition of a Gram matrix: ≤ 7e-12
ITERATIVE = 1e-6  # an oracle that is itself an iteration, stopped early
TIE = 1e-12  # absolute: nats between two sums of a few terms that differ only in their order: ≤ 1e-15
LIBRARIES = 1e-9  # whole models on another processor or another torch: a few hundred sums one after the other

# A refit layer by layer: rounding of 2e-16 times the amplification by the truncation, √(cond A · cond B) over the gap
# of the squared singular values at the rank, which the oracle keeps below AMPLIFICATION. That is the worst case, 2e-7;
# errors of random sign stay at ≤ 2e-12. Anything in float32 shows: a B that is symmetric to 6e-8 only gave 8e-9.
AMPLIFIED = 1e-9
AMPLIFICATION = 1e9

# narrower types -----------------------------------------------------------------------------------------------------

FLOAT32 = 2e-5  # float32 sums of some ten to a hundred terms
BFLOAT16 = 4e-2  # two bfloat16 products one after the other, 8 bits of mantissa each
FACTOR_CAST = {"float64": ROUNDING, "float32": FLOAT32, "bfloat16": BFLOAT16}  # by the dtype that factors are cast to
PARTLY_FLOAT32 = 1e-4  # float64 models whose own code rounds to float32 (norms, softmax, causal losses): ≤ 2e-6
REFIT_FLOAT32 = 5e-4  # a refit of float64 models with products in float32: ≤ 6e-6
FLOAT32_MODEL = 5e-4  # statistics of a float32 model and of its float64 copy: ≤ 3e-6
BFLOAT16_MODEL = 0.15  # statistics of a bfloat16 model and of its float64 copy; weights and gradients have 8 bits
