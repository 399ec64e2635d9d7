"""A job of thousands of ranks in one process: production code in every rank's place, on a store in memory."""

import contextlib
import gc
import json
import time
from collections import Counter
from pathlib import Path

import torch

from dcpsvc import choosing
from dcpsvc.blueprint import Blueprint, Blueprints
from dcpsvc.format import layout, parts
from dcpsvc.format.digest import digest, table_nbytes
from dcpsvc.format.epochs import Claim
from dcpsvc.format.keys import Epoch
from dcpsvc.format.manifest import LayoutRef, Manifest, ShardRecord
from dcpsvc.format.manifest import loads as load_manifest
from dcpsvc.format.parse import compact
from dcpsvc.ranks.c10d import SoloStore
from dcpsvc.ranks.job import Job
from dcpsvc.ranks.rendezvous import Meeting, Rendezvous
from dcpsvc.stages import ack, commit
from dcpsvc.state import claims
from dcpsvc.state.collected import Collected, Item, Sharing
from dcpsvc.state.replicas import Replicas
from dcpsvc.storage.memory import MemoryStore

MEETING = Meeting(3600.0)
BODY_NBYTES = 16
EPOCH = Epoch(1, "deadbeef")
STAMP = {"created": "2026-01-31T23:59:59.000Z", "metrics": {"loss": 1.5}, "versions": {"torch": "2.13.0"}}
TIERS = ("local", "remote")
BESIDE = {"ms": [1500, 12000, 90000], "adapter": None}
STEADY = ("plan again", "agree", *(f"ack {tier}" for tier in TIERS), "manifest", "commit")


class LaterError(Exception):
    """A simulated rank has said what it has to say, and would wait now."""


class Wire(SoloStore):
    """The ranks' store; counts what each rank writes to it."""

    def __init__(self):
        super().__init__()
        self.posting, self.sent, self.said = False, Counter(), {}

    def set(self, key, value):
        self.said[key] = value
        self.sent[key.rpartition("/")[2]] += len(key) + len(value)
        super().set(key, value)

    def get(self, key):
        if self.posting and key.endswith("/verdict"):
            raise LaterError
        return super().get(key)


class Records:
    """Our group, in which everybody has given its record already."""

    generation, poisoned = 0, False

    def __init__(self, said):
        self.said = said

    def all_gather(self, data):
        del data
        return self.said


class Simulation:
    """A job of ``ranks`` that saves a model of ``tensors`` sharded tensors, of which there are ``replicas`` (HSDP)."""

    def __init__(self, ranks, tensors, replicas=1):
        if ranks % replicas or (replicas > 1 and ranks == replicas):
            raise ValueError(f"{ranks} ranks are no mesh of {replicas} replicas of several shards")
        self.ranks, self.tensors, self.shards = ranks, tensors, ranks // replicas
        self.wire, self.phases = Wire(), {}
        self.key = EPOCH.attempt(500, 0)
        self.store = MemoryStore(f"scale-{ranks}-{tensors}")
        self.store.create(EPOCH.claim, Claim(epoch=EPOCH, host="here", pid=1, created=STAMP["created"]).dumps())
        self.records = [self._record(rank) for rank in range(ranks)]
        self.group = Records([compact(record.to_json() | BESIDE) for record in self.records])

    def run(self):
        blueprints = Blueprints(0, self.ranks)
        first, later = self._collected(0), self._collected(0)
        part = self._timed("plan", lambda: blueprints.of(first).part, nbytes=lambda part: len(part.common + part.own))
        said, values = self._timed(
            "plan again",
            lambda: (_said(later), blueprints.of(later).part)[0],
            nbytes=lambda _: 0,
        )
        made = self._layout()
        manifest = self._agree(said, values, part, made)
        self._commit(manifest, made)
        self._steady()
        return [{"ranks": self.ranks, "tensors": self.tensors, "phase": name, **p} for name, p in self.phases.items()]

    def _collected(self, rank):
        """What one rank would save: a row of every tensor; where replicas divide them, enough rows to be cut."""
        collected, shard = Collected(rank), rank % self.shards
        alike = tuple(range(shard, self.ranks, self.shards)) if self.shards < self.ranks else ()
        local = torch.empty(()).expand(512, 1024) if alike else torch.empty(1, 2)
        how = {"alike": alike, "validate": "off"}  # there are no bytes to compare
        offsets, shape = (shard * local.shape[0], 0), (self.shards * local.shape[0], local.shape[1])
        for index in range(self.tensors):
            item = Item(local, "F32", shape, offsets, Sharing.SHARDED, writes=True, origin=local, **how)
            collected.items[f"model.layers.{index}.mlp.weight"] = item
        return collected

    def _part(self, rank):
        return Blueprint(self._collected(rank), rank, self.ranks).part

    def _layout(self):
        """The parts of all ranks, put together; only when the structure changed.

        Those of the first and last rank of each replica are made by production code; those between are like them.
        """
        owns, common = [], {}
        for begin in range(0, self.ranks, self.shards):
            first, last = self._part(begin), self._part(begin + self.shards - 1)
            if last.common != first.common:
                raise ValueError("the ranks of an even mesh have all in common")
            common[digest(first.common)] = first.common
            said = json.loads(last.own)
            between = range(1, self.shards - 1)
            owns += [first.own, *(compact(said | {"rank": begin + n, "position": [n]}) for n in between), last.own]
        data = self._timed("layout", lambda: self._merged(owns, common), nbytes=len)
        self.phases["layout"]["received_nbytes"] = sum(map(len, (*owns, *common.values())))
        self._timed("read layout", lambda: layout.loads("layout", data, digest(data)), nbytes=lambda _: len(data))
        return data

    def _merged(self, owns, common):
        return parts.merge(owns, {name: common[name] for name in parts.speakers(owns)}).dumps()

    def _agree(self, said, values, part, made):
        """First meeting, then the acknowledgements, then the manifest every rank makes of them."""
        proposal = ack.Proposal(step=500, said=said, part=part, known_layout=digest(made), stamp=STAMP)
        self._meeting("agree", lambda job: ack.agree(job, "save", proposal, MEETING, lambda: None))
        for tier, equal in zip(TIERS, (values, {}), strict=True):
            acks = self._meeting(
                f"ack {tier}",
                lambda job, t=tier, v=equal: ack.acknowledge(job, "save", t, self.records[job.rank], MEETING, values=v),
            )
        reference = LayoutRef(digest=digest(made), nbytes=len(made))
        manifest = Manifest(
            run_id="scale", step=500, attempt=self.key.attempt, created=STAMP["created"], shards=tuple(acks.records),
            layout=reference, metrics=STAMP["metrics"], versions=STAMP["versions"],
        )  # fmt: skip
        self._timed("manifest", lambda: (manifest.dumps(), digest(manifest.dumps()))[0], nbytes=len)
        return manifest

    def _commit(self, manifest, made):
        """The one write that counts; and how a restarted job finds it again."""
        for record in self.records:
            self.store.put(record.path, b"-" * record.nbytes)
        self.store.put(manifest.layout.path, made)
        within = {"within": lambda work: work(), "created": int}
        self._meeting(
            "commit", lambda job: commit.publish(job, "save", manifest, self.store, meeting=MEETING, **within)
        )
        data = manifest.dumps()
        self._timed("read manifest", lambda: load_manifest(manifest.key.manifest, data), nbytes=lambda _: len(data))
        self._timed("discover", lambda: choosing.choose(self.store, None), nbytes=lambda _: len(data))

    def _meeting(self, name, act):
        """All ranks but the coordinator say what they have to say; then it decides, and that is timed.

        Rank 1 does it in production code. The others would say the very same, so they are given its words.
        """
        self.wire.posting, self.wire.sent, self.wire.said = True, Counter(), {}
        with contextlib.suppress(LaterError):
            act(self._job(1))
        for key, value in list(self.wire.said.items()):
            for rank in range(2, self.ranks):
                self.wire.set(f"{key.rpartition('/')[0]}/{rank}", value)
        self.wire.posting = False
        return self._timed(name, lambda: act(self._job(0)), nbytes=lambda _: max(self.wire.sent.values()))

    def _steady(self):
        """One save of a structure that is known: what one rank sends, and what it gets from the others."""
        record = len(TIERS) * len(self.group.said[0])
        phases = [self.phases[name] for name in STEADY]
        sent = record + sum(phase["nbytes"] for phase in phases if phase is not self.phases["manifest"])
        self.phases["steady"] = {
            "s": sum(phase["s"] for phase in phases), "nbytes": sent, "received_nbytes": record * self.ranks,
            "peak_mib": max(phase["peak_mib"] for phase in phases),
        }  # fmt: skip

    def _timed(self, name, work, nbytes):
        gc.collect()
        before = _reset_peak()
        began = time.process_time()
        result = work()
        seconds = time.process_time() - began
        self.phases[name] = {"s": seconds, "nbytes": nbytes(result), "peak_mib": (_status("VmHWM") - before) / 1024}
        return result

    def _job(self, rank):
        rendezvous = Rendezvous(rank, self.ranks, self.wire, namespace="run")
        return Job(rank, self.ranks, "run", rendezvous, self.group)

    def _record(self, rank):
        nbytes = BODY_NBYTES + table_nbytes(BODY_NBYTES)
        path = self.key.shard(rank)
        return ShardRecord(rank=rank, path=path, nbytes=nbytes, body_nbytes=BODY_NBYTES, digest="ab" * 16)


def _reset_peak():
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def _said(collected):
    """At the first meeting, and at the first acknowledgement."""
    replicas = Replicas(collected, {}, later=False, guarded=False)
    replicas.complete(None)
    return claims.claims(collected), replicas.said
