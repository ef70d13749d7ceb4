"""Tuning: problems, predictions, measurements, and the tables that come of them.

What is searched, and how, is in :mod:`tilelink.schedules` (`space`, `search`, `tables`), which measures
nothing. Here is what compiles and runs: `predict` asks the virtual clock, `measure` the GPUs.
"""

# Environment of a process that measures. NVLink multicast stays off: its use can put the GPUs of a shared
# host out of service.
NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
