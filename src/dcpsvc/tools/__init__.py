"""What the command line does, as functions that return values: listing, showing, verifying.

=========================  ========================================================================
listing, showing           ``ls``, ``show``: all checkpoints, and one in full
verifying, verifyjournal   ``verify``: every byte; what is proven so far
comparing, numbers         ``diff``: names and values; the numbers in two tensors
usage, reporting           ``du``, ``report``
tables                     how these are shown
clearing, cleartables      ``gc``: removes; how it is shown
clearplan, clearrules      what would go; what may
leftovers, localtier       what is not to stay at the run root; on this node's disk
mirroring, fetching        ``cp``, ``fetch``: under their own names; one shard
surgery, changes           ``edit``, ``promote``: a new checkpoint of another; what to change in it
transplant, newshard       its shards written anew; one shard outside of a job
owning                     taking a run root over for it, as a job does
exporting, folder          ``export``; the directory it goes into
adapterfolder              the folder of PEFT beside a checkpoint's shards
importing, foreign         ``import``; what other libraries wrote
foreignoptimizer, casting  their optimizers; other precisions
live, livetables           ``status``, ``save``, ``stop``: asking a live job; how it is shown
drill, judging, processes  ``drill sigterm``; its verdict; a command and all it started
remedies                   what somebody can do about a store that said no
=========================  ========================================================================
"""
