"""The main road, from an update to a certified recovery.

Read in this order: ``problem``, ``invert``, ``batch_rows``, ``answer``, ``polish``,
``certificate``, ``outcomes``, ``fallback``; ``single``, ``several`` and ``parts`` for what is
determined where the road does not reach the data.
"""
