"""The Triton kernels and their launchers: a function for each op of torch.ops.fastda that they serve, under its name.

Importing a module of these imports Triton; fastda.kernels.launchers does so at the first call.
"""
