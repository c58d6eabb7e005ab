"""Benchmarks of adamw_kernels: runs write CSV rows, plots read CSV rows.

`python -m bench` measures steps, training loops, peak memory, host cost, accuracy and the quality of storage formats on
this machine, appends rows to `bench/results/<machine>/` and draws the figures from them. `python -m bench list` says
what would run.

The rules, each kept in one module:

- Every variant is checked against float64 AdamW on the very tensors that are timed (`check.py`); one that
  fails, or was not checked, is not timed.
  Training loops are checked against the same loop in float64 (`workloads.py`).
- Variants are sampled in interleaved rounds, A B C A B C, so that a drift of the machine hits all of them, and
  the roof they are compared with is sampled in the same rounds (`timing.py`, `roof.py`).
- Bytes are counted from the tensors an optimizer really keeps, once per read and once per write (`traffic.py`).
- Rows carry the machine, versions, commit and clock time (`rows.py`, `machine.py`); `plot.py` and `plot_loop.py` see
  nothing else.
"""
