"""One thread for the suite and what it starts: tensors are tiny here, and waiting threads cost more than they give."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported, here and in child processes
