"""The main road, from an update to a certified recovery.

Read in this order: ``problem``, ``invert``, ``batch_rows``, ``answer``, ``polish``,
``certificate`` (with ``backing`` and ``replay``), ``outcomes`` (with ``symptoms``), ``fallback``;
then ``single`` and ``several`` (with ``targets``) for networks whose top no equation covers,
``factor`` and ``batch_size`` for what nobody stated, ``parts`` for data of which some are open.
"""
