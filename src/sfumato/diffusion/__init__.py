"""The mathematics: noise levels, schedules, grids, parameterizations, denoisers, guidance, solvers, objectives.

Nothing here knows a network, a file or a picture format: networks come in as objects, pictures as tensors.
"""
