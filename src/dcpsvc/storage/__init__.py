"""Durable places for a run root: a directory, this process's memory, or any fsspec URL.

======================  ==============================================================================
base, ranges            the contract of every store; what all say about ranges that do not fit
open, placed, names     from what a user writes to a store; where a file may be instead; keys and URLs
posix, posixfile        a directory; the few steps that make a file appear whole
diskfile, diskread      a large file written once, front to back; read in blocks
aside, oserror          proven blocks that wait on the disk; what the system's errors mean
memory                  a store in this process
objectstore             any fsspec URL, and the only place that knows the clients
wire, s3wire, filewire  the ways to move bytes through fsspec: of S3, of other file systems
s3client, s3control     clients that are kept; requests that carry no data
direct, multipart       bytes straight between memory and a socket; one large file in parts
outgoing, parts, cargo  a file read part by part; where a part ends; what became of it
bodysum                 checksums that travel with the bytes
conflict, remoteerror   our own object or somebody else's; what the clients' errors mean
retry, patience, tries  another try for what may pass; how long; how often it happened
pace, nodeturns         how hard a process works a store; turns that a node's processes share
paging, threads         listings that come in parts; calls side by side
storeclock              by which a store dates what is written
shards, source          no unproven byte of a shard gets out; a shard as one store has it
scatter, fetch          many ranges of one shard; what is needed of many
wholefile, bounded      small files that are proven as a whole; a disk that may hang
unchanged, rates        what an earlier shard at the same root has already; whether to copy it or to send it
======================  ==============================================================================
"""
