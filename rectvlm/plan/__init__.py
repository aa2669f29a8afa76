"""What a configuration costs before a GPU is rented: parameters, memory, FLOPs, time and disk.

A micro-batch is dry-run on the meta device, so every figure comes from the modules, losses and
settings that train; no size is repeated here. What a dry run cannot show (the CUDA context, the
allocator's waste, the rates of hardware) is a constant with its reason.
"""
