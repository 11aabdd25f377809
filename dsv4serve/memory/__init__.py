"""The tensors behind slots, pages and tails: byte layouts, pools, capacity plan."""

from dsv4serve.memory.layout import CacheLayout, LayerLayout
from dsv4serve.memory.plan import CapacityPlan, plan_capacity
from dsv4serve.memory.pools import CachePools, LayerCache

__all__ = ["CacheLayout", "CachePools", "CapacityPlan", "LayerCache", "LayerLayout", "plan_capacity"]
