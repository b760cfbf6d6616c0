"""placeholder"""

from rgap.labels.head import HeadGradient
from rgap.labels.restoration import ilrg


def best(head: HeadGradient):
    return ilrg(head)
