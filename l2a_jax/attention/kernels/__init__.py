"""Flash-attention kernels in Pallas, lowered through Triton; `plan` says which rows and keys they work on."""
