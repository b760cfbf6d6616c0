"""Separation of a batch: from the mixture ``G = Kᵀ X`` of a fully connected layer to its samples.

``route`` picks the equations and says why: ``pair`` for two fully connected layers in a row,
``softmax`` for a head that stands alone; ``sparsity`` is the published route for ReLU layers, kept
for comparison.
"""
