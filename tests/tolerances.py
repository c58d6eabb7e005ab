"""Every tolerance of the test suite, each with its reason. A comparison that is not named here is exact."""

TOLERANCES: dict[str, tuple[float, str]] = {
    "hand_worked": (
        1e-15,
        "Decimal literals such as 0.89 are not float64 values: a few roundings of 1.1e-16 on numbers below 1.",
    ),
    "float64_against_torch": (
        1e-14,
        "torch orders float64's operations differently. Two or three roundings of 1.1e-16 a step over 20 steps, "
        "relative to the largest value of the array (elements near zero are differences of larger numbers). "
        "Measured: at most 1e-15.",
    ),
    "one_update_in_float32": (
        6 * 2.0**-24,
        "step_size and inv_sqrt_bc2 are rounded once each; a root, two products and a quotient follow: six relative "
        "errors of at most float32's unit roundoff.",
    ),
    "rounding_of_a_product": (
        2.0**-53,
        "float64's unit roundoff. A product of t factors, in whatever order, holds t - 1 roundings.",
    ),
    "accuracy_margin": (
        8.0,
        "torch.optim.AdamW's error over ours, a lower bound. Measured over nine seeds: 14 to 15 (lr = 1e-3), 15 to 17 "
        "(3e-4), 21 to 24 (1e-5) and 8.7 to 9.1 (1e-6, where what limits us is the rounding of float32 weights).",
    ),
    "accuracy_over_rounded_weights": (
        1.05,
        "Our error over that of float64 steps whose weights alone are rounded to float32, an upper bound. Measured: "
        "1.03 at lr = 1e-3 and weights of 0.02, less elsewhere.",
    ),
    "host_logic_in_float64": (
        1e-11,
        "float64_against_torch where the question is whether a value, a count or a flag arrived: what did not arrive "
        "differs by 1e-3. Measured: at most 3e-14, and 5e-12 where beta2 = 0 forgets a second moment thousands of "
        "times larger than the squared gradient (v + 1 * (g * g - v) rounds at the size of v).",
    ),
    "float32_against_torch": (
        1e-5,
        "A dozen steps on the same gradients: a few roundings of 6e-8 a step. Measured: at most 3e-7.",
    ),
    "float32_trajectory_against_torch": (
        1e-4,
        "Fifty steps of a network, each on gradients at its own weights: differences of 1e-7 feed back through the "
        "loss and grow. Measured: 5e-6 in a first moment, 2e-6 in the weights.",
    ),
    "float64_trajectory_against_torch": (
        1e-12,
        "The same in float64. Measured: 4e-14.",
    ),
    "bfloat16_against_torch": (
        2.0**-6,
        "Weights rounded to 8 bits at each of three steps, and torch's moments too: two units in the last place of the "
        "largest weight. Measured: 5e-3. Without the loaded moments they differ by 0.2 and more.",
    ),
    "norm_in_float64": (
        1e-14,
        "A few dozen float64 squares, added in another order, and one product with the clip coefficient. Measured: "
        "3e-16.",
    ),
    "norm_in_float32": (
        1e-6,
        "The same rounded to float32 once, by us, or at every square, by torch. Measured: 1.2e-7.",
    ),
    "sharded_against_whole": (
        1e-12,
        "Float64 gradients of a batch in two parts, norms as sums over shards: another order of a few dozen additions. "
        "What was not reduced differs by 1e-1. Measured: 7e-16.",
    ),
    "one_float32_rounding": (
        2.0**-24 * (1 + 1e-6),
        "float32's unit roundoff; what is rounded is exact to 1e-12.",
    ),
    "clipped_to_the_limit": (
        1e-5,
        "torch's coefficient divides by norm + 1e-6: a norm above 0.1 ends up below the limit by at most 1e-5 of it. "
        "Measured: 4e-6.",
    ),
    "clipped_in_bfloat16": (
        2.0**-7,
        "The gradient's product with the coefficient is rounded to 8 bits, and so may be the coefficient before it. "
        "Measured: 2.5e-3.",
    ),
    "clipped_in_float16": (
        2.0**-10,
        "The same with 11 bits. Measured: 2.3e-4.",
    ),
}


def tolerance(name: str) -> float:
    """Return the tolerance called `name`; its reason stands beside it in `TOLERANCES`."""
    return TOLERANCES[name][0]
