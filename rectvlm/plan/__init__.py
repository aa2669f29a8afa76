"""What a configuration costs before a GPU is rented: parameters, memory by kind, FLOPs, time, disk.

The skeleton of the model is rehearsed on the meta device, so every figure comes from the modules, losses and settings
that train; nothing here repeats a size. What cannot be rehearsed (the CUDA context, the allocator's waste, rates of
hardware) is a constant with its reason.
"""

from rectvlm.plan.planner import ResourcePlan, ResourcePlanner
from rectvlm.plan.step_time import HardwareRates

__all__ = ["HardwareRates", "ResourcePlan", "ResourcePlanner"]
