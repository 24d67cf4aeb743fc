"""``navagent doctor``: looks at the whole installation, says what is wrong with it and how to mend it.

Whatever may be broken is only touched in a process of its own (:mod:`navagent.doctor.probe`), so that a
library that crashes on import is reported instead of taking the doctor with it.
"""
