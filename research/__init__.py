"""Research."""

from tlpipeline.environment import set_thread_waiting

set_thread_waiting()  # before torch is imported, which reads it
