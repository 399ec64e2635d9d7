"""What is saved: from the objects of a training script to tensors with names and JSON documents, and back.

=========================  =======================================================================================
app                        the user's mapping of names to objects, as components in the order they must be handled
module, optimizer, values  the components: modules; optimizers; everything else
optimview, optimnames      an optimizer over the model's parameters; what those are called
optimsaved, optimunsaved   an optimizer as a checkpoint has it; tensors on it that none has
rng, metrics               generators; metric objects of torchmetrics
sharing                    declarations of how a value is spread over the ranks: ``PerRank``, ``Replicated``, ...
inner, refill, standin     tensors made of others; loading into them; what an optimizer would begin with
base, buffers              of a checkpoint of an adapter: what it leaves out; which buffers it holds
extrastates                what modules give beside their tensors
wrappers, origin, meta     what stands around a module; what it says of itself; modules without memory
fsdp1, ragged, meshes      FSDP1; consecutive elements as if flat; who holds the same part of a DTensor
collected, claims          what one rank would save now; what it says of that, for the ranks to compare
division, replicas         who writes what; hashes of what several ranks hold alike
fingerprint                of tensors, adding up over the parts that ranks hold
documents, dtypes          values as JSON; names of dtypes
saved, drift               a checkpoint as the components see it; where it and the state differ
chunks, boxes              which part of a tensor a rank holds; of a saved one, and the memory they go to
saveplan, loadplan         what DCP is told when we save, and when we load
dcp_quirks                 what DCP does to its callers, undone in one place
=========================  =======================================================================================
"""
