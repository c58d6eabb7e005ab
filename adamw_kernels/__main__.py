"""`python -m adamw_kernels`: what exists here, what is chosen, and why not the rest."""

from adamw_kernels.backends import describe

if __name__ == "__main__":
    describe()
