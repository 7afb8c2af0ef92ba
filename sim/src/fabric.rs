//! A fabric without coherence, in one process, from one seed.
//!
//! Each host has its own cache:
//!
//! - A store stays in it until it is flushed *and* fenced, or until the line is evicted at a random moment.
//! - A line that was read stays as it was until it is invalidated or evicted.
//! - A flush that no fence follows completes at a random moment.
//! - A flush that is fenced completes before any later store or flush of the host does, but maybe after later loads. A full
//!   fence completes it at once.
//! - A line that is invalidated is written back first if it is dirty, as `clflushopt` does. A process that invalidates what it
//!   stored itself forgot to flush it, which is an error of the code under test.
//! - A write-back moves a whole line. Two hosts that write one line therefore destroy each other's words, as in real memory.
//! - A crashed host loses its cache.
//!
//! A host may have several processes, which share its cache. Fences are those of a process. One that is killed leaves what
//! it stored in the cache of its host.

use embarcadero_cxl::{Fabric, Guard, LINE_BYTES, RegionOffset, Site};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const WORDS: usize = 8;
type LineWords = [u64; WORDS];

/// Probabilities of what happens to caches by chance, each from 0 to 1 and per operation of a host.
#[derive(Clone, Copy, Debug)]
pub struct Turbulence {
    /// Probability that a random line of the acting host is evicted, and written back if it is dirty.
    pub evict: f64,
    /// Probability that a random unfenced flush of the acting host completes.
    pub drain: f64,
    /// Probability that a fence which is not full lets later loads of its host run before the flushes it fences complete.
    pub delay: f64,
    /// Probability that a line which is fetched brings the next one along, as hardware prefetchers do.
    pub prefetch: f64,
}

impl Turbulence {
    /// Caches that lose a line early every few operations, with all fences full.
    pub const ROUGH: Self = Self { evict: 0.05, drain: 0.2, delay: 0.0, prefetch: 0.3 };
    /// [`Turbulence::ROUGH`] with loads that pass fences, for hosts that speak to each other through the region alone.
    pub const ROUGHEST: Self = Self { delay: 0.3, ..Self::ROUGH };
    /// Caches that do only what the code asks for.
    pub const CALM: Self = Self { evict: 0.0, drain: 0.0, delay: 0.0, prefetch: 0.0 };
}

/// Part of the protocol that a simulation leaves out, to see whether a test notices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// A flush, fence or invalidate.
    Site(Site),
    /// A full fence, replaced by an ordinary one.
    FullFence(Site),
    /// A check.
    Guard(Guard),
}

struct CachedLine {
    words: LineWords,
    /// Process that stored last, if the line is dirty.
    dirtied_by: Option<usize>,
}

/// Process of a host. Its fences order its own flushes.
#[derive(Default)]
struct Process {
    /// Lines that are flushed and not fenced, as they were when flushed.
    pending: BTreeMap<u64, LineWords>,
    /// Lines that are flushed and fenced. They reach memory, all at once, before any other line of this process does.
    fenced: BTreeMap<u64, LineWords>,
    /// True once it was killed, or its host crashed. Whatever its code still does reaches nobody.
    dead: bool,
}

impl Process {
    /// Completes the fenced flushes.
    fn settle(&mut self, memory: &mut [LineWords]) {
        for (line, words) in std::mem::take(&mut self.fenced) {
            write_memory(memory, line, words);
        }
    }

    /// Returns a line that was flushed and may not be in memory yet.
    fn in_flight(&self, line: u64) -> Option<&LineWords> {
        self.pending.get(&line).or_else(|| self.fenced.get(&line))
    }
}

#[derive(Default)]
struct Host {
    cache: BTreeMap<u64, CachedLine>,
    processes: Vec<Process>,
}

impl Host {
    /// Completes the fenced flushes of all processes.
    fn settle(&mut self, memory: &mut [LineWords]) {
        self.processes.iter_mut().for_each(|process| process.settle(memory));
    }

    /// Returns a line that some process flushed and that may not be in memory yet.
    fn in_flight(&self, line: u64) -> Option<&LineWords> {
        self.processes.iter().find_map(|process| process.in_flight(line))
    }

    /// Completes the flushes of lines by processes other than `own`. So a line is under way for one process at a time.
    fn complete_others(&mut self, memory: &mut [LineWords], own: usize, lines: &Range<u64>) {
        for process in self.processes.iter_mut().enumerate().filter(|(other, _)| *other != own).map(|(_, other)| other)
        {
            let pending: Vec<u64> = process.pending.range(lines.clone()).map(|(line, _)| *line).collect();
            if !pending.is_empty() || process.fenced.range(lines.clone()).next().is_some() {
                process.settle(memory);
            }
            for line in pending {
                if let Some(words) = process.pending.remove(&line) {
                    write_memory(memory, line, words);
                }
            }
        }
    }

    /// Drops a line from the cache. It is written back if it is dirty, or was flushed and is not in memory yet.
    fn evict(&mut self, memory: &mut [LineWords], line: u64) {
        let flushed = self.processes.iter_mut().find_map(|process| process.pending.remove(&line));
        let dirty = self.cache.remove(&line).filter(|cached| cached.dirtied_by.is_some()).map(|cached| cached.words);
        if let Some(words) = dirty.or(flushed) {
            self.settle(memory);
            write_memory(memory, line, words);
        }
    }
}

fn write_memory(memory: &mut [LineWords], line: u64, words: LineWords) {
    if let Some(slot) = memory.get_mut(line as usize) {
        *slot = words;
    }
}

/// Memory that all simulated hosts share, and their caches.
pub struct World {
    memory: Vec<LineWords>,
    hosts: Vec<Host>,
    rng: StdRng,
    turbulence: Turbulence,
    removed: Option<Mutation>,
    visits: BTreeMap<u8, u64>,
}

impl World {
    /// Makes a region of `bytes` zero bytes (a multiple of 64). `removed` is left out of the protocol.
    #[must_use]
    pub fn new(bytes: u64, seed: u64, turbulence: Turbulence, removed: Option<Mutation>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            memory: vec![[0; WORDS]; (bytes / LINE_BYTES) as usize],
            hosts: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
            turbulence,
            removed,
            visits: BTreeMap::new(),
        }))
    }

    /// Changes what happens by chance, for example to [`Turbulence::CALM`] before a check that everything arrives.
    pub fn set_turbulence(&mut self, turbulence: Turbulence) {
        self.turbulence = turbulence;
        let Self { memory, hosts, .. } = self;
        hosts.iter_mut().for_each(|host| host.settle(memory));
    }

    /// Returns how often the hosts passed a site.
    #[must_use]
    pub fn visits(&self, site: Site) -> u64 {
        self.visits.get(&(site as u8)).copied().unwrap_or(0)
    }

    fn weather(&mut self, Place { host, process }: Place) {
        let Self { memory, hosts, rng, turbulence, .. } = self;
        let Some(host) = hosts.get_mut(host) else { return };
        let Some(process) = host.processes.get_mut(process) else { return };
        if turbulence.drain > 0.0 && !process.fenced.is_empty() && rng.random_bool(turbulence.drain) {
            process.settle(memory);
        }
        if turbulence.drain > 0.0 && !process.pending.is_empty() && rng.random_bool(turbulence.drain) {
            let pick = rng.random_range(0..process.pending.len());
            if let Some(line) = process.pending.keys().nth(pick).copied()
                && let Some(words) = process.pending.remove(&line)
            {
                process.settle(memory);
                write_memory(memory, line, words);
            }
        }
        if turbulence.evict > 0.0 && !host.cache.is_empty() && rng.random_bool(turbulence.evict) {
            let pick = rng.random_range(0..host.cache.len());
            if let Some(line) = host.cache.keys().nth(pick).copied() {
                host.evict(memory, line);
            }
        }
    }

    fn line_of(&mut self, host: usize, line: u64) -> Option<&mut CachedLine> {
        let Self { memory, hosts, rng, turbulence, .. } = self;
        let host = hosts.get_mut(host)?;
        if !host.cache.contains_key(&line) {
            let fetch =
                |line: u64| memory.get(line as usize).map(|words| CachedLine { words: *words, dirtied_by: None });
            let mut fetched = fetch(line)?;
            if let Some(own) = host.in_flight(line) {
                fetched.words = *own;
            }
            if turbulence.prefetch > 0.0
                && rng.random_bool(turbulence.prefetch)
                && !host.cache.contains_key(&(line + 1))
                && host.in_flight(line + 1).is_none()
                && let Some(next) = fetch(line + 1)
            {
                host.cache.insert(line + 1, next);
            }
            host.cache.insert(line, fetched);
        }
        host.cache.get_mut(&line)
    }

    fn fence(&mut self, Place { host, process }: Place, full: bool) {
        let Self { memory, hosts, rng, turbulence, .. } = self;
        let Some(process) = hosts.get_mut(host).and_then(|host| host.processes.get_mut(process)) else { return };
        if process.dead {
            return;
        }
        process.fenced.append(&mut process.pending);
        if full || turbulence.delay == 0.0 || !rng.random_bool(turbulence.delay) {
            process.settle(memory);
        }
    }

    fn is_dead(&self, Place { host, process }: Place) -> bool {
        self.hosts.get(host).and_then(|host| host.processes.get(process)).is_none_or(|process| process.dead)
    }

    fn passes(&mut self, site: Site) -> bool {
        *self.visits.entry(site as u8).or_default() += 1;
        self.removed != Some(Mutation::Site(site))
    }
}

/// Process of a world: the index of its host, and its own among those of the host.
#[derive(Clone, Copy)]
struct Place {
    host: usize,
    process: usize,
}

/// View that one process has of a [`World`]. Others may run before each of its operations.
#[derive(Clone)]
pub struct Simulated {
    world: Arc<Mutex<World>>,
    place: Place,
    bytes: u64,
    interleave: fn(),
}

impl Simulated {
    /// Adds a host with one process to the world. `interleave` is called before every operation: a deterministic scheduler
    /// may switch to another process there.
    #[must_use]
    pub fn join(world: &Arc<Mutex<World>>, interleave: fn()) -> Self {
        let mut inner = lock(world);
        inner.hosts.push(Host { processes: vec![Process::default()], ..Host::default() });
        let host = inner.hosts.len() - 1;
        let bytes = inner.memory.len() as u64 * LINE_BYTES;
        drop(inner);
        Self { world: Arc::clone(world), place: Place { host, process: 0 }, bytes, interleave }
    }

    /// Adds a process to this one's host, which must not have crashed. Both share the host's cache.
    #[must_use]
    pub fn beside(&self, interleave: fn()) -> Self {
        let mut world = lock(&self.world);
        let host = &mut world.hosts[self.place.host];
        let process = host.processes.len();
        host.processes.push(Process::default());
        drop(world);
        Self { place: Place { process, ..self.place }, interleave, ..self.clone() }
    }

    /// Stops the host for good. Its cache is lost, and unfenced flushes complete or not by chance. Whatever the code of its
    /// processes still does reaches nobody.
    pub fn crash(&self) {
        let mut world = lock(&self.world);
        let World { memory, hosts, rng, .. } = &mut *world;
        let Some(host) = hosts.get_mut(self.place.host) else { return };
        for process in &mut host.processes {
            process.settle(memory);
            for (line, words) in std::mem::take(&mut process.pending) {
                if rng.random_bool(0.5) {
                    write_memory(memory, line, words);
                }
            }
            process.dead = true;
        }
        host.cache.clear();
    }

    /// Kills the process. The cache of its host lives on: what the process stored is written back when the line is evicted,
    /// or flushed by another process. Unfenced flushes are as if they had not begun.
    pub fn kill(&self) {
        let mut world = lock(&self.world);
        let World { memory, hosts, .. } = &mut *world;
        let Some(Host { cache, processes }) = hosts.get_mut(self.place.host) else { return };
        let own = self.place.process;
        let Some(process) = processes.get_mut(own) else { return };
        process.settle(memory);
        for (line, words) in std::mem::take(&mut process.pending) {
            cache.entry(line).or_insert(CachedLine { words, dirtied_by: None }).dirtied_by.get_or_insert(own);
        }
        process.dead = true;
    }

    /// Begins an operation: something may happen by chance, and then other hosts may run.
    fn enter(&self) -> MutexGuard<'_, World> {
        lock(&self.world).weather(self.place);
        (self.interleave)();
        lock(&self.world)
    }

    fn lines(at: RegionOffset, len: u64) -> Range<u64> {
        at.0 / LINE_BYTES..(at.0 + len).div_ceil(LINE_BYTES)
    }
}

fn lock(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fabric for Simulated {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn load(&self, at: RegionOffset) -> u64 {
        assert!(at.0 + 8 <= self.bytes && at.0.is_multiple_of(8), "load at {at:?}");
        let mut world = self.enter();
        let word = (at.0 % LINE_BYTES / 8) as usize;
        world.line_of(self.place.host, at.0 / LINE_BYTES).map_or(0, |line| line.words[word])
    }

    fn store(&self, at: RegionOffset, value: u64) {
        assert!(at.0 + 8 <= self.bytes && at.0.is_multiple_of(8), "store at {at:?}");
        let mut world = self.enter();
        if world.is_dead(self.place) {
            return;
        }
        let word = (at.0 % LINE_BYTES / 8) as usize;
        if let Some(line) = world.line_of(self.place.host, at.0 / LINE_BYTES) {
            line.words[word] = value;
            line.dirtied_by = Some(self.place.process);
        }
    }

    fn flush(&self, at: RegionOffset, len: u64, site: Site) {
        let mut world = self.enter();
        if !world.passes(site) {
            return;
        }
        if world.is_dead(self.place) {
            return;
        }
        let World { memory, hosts, .. } = &mut *world;
        let (host, lines) = (&mut hosts[self.place.host], Self::lines(at, len));
        host.complete_others(memory, self.place.process, &lines);
        let pending = &mut host.processes[self.place.process].pending;
        for (line, cached) in host.cache.range_mut(lines) {
            if cached.dirtied_by.take().is_some() {
                pending.insert(*line, cached.words);
            }
        }
    }

    fn fence(&self, site: Site) {
        let mut world = self.enter();
        if world.passes(site) {
            world.fence(self.place, false);
        }
    }

    fn full_fence(&self, site: Site) {
        let mut world = self.enter();
        if world.passes(site) {
            let full = world.removed != Some(Mutation::FullFence(site));
            world.fence(self.place, full);
        }
    }

    fn invalidate(&self, at: RegionOffset, len: u64, site: Site) {
        let mut world = self.enter();
        if !world.passes(site) {
            return;
        }
        let is_dead = world.is_dead(self.place);
        let World { memory, hosts, .. } = &mut *world;
        let (host, lines) = (&mut hosts[self.place.host], Self::lines(at, len));
        if host.processes.iter().all(|process| process.dead) {
            // Its code goes on for a moment, and reads what there is.
            host.cache.retain(|line, cached| cached.dirtied_by.is_some() || !lines.contains(line));
            return;
        }
        if is_dead {
            return;
        }
        let own = Some(self.place.process);
        let mut changed = host.cache.range(lines.clone()).filter(|(_, cached)| cached.dirtied_by == own);
        let forgotten = changed.next().map(|(line, _)| *line);
        assert_eq!(forgotten, None, "{site:?} drops a line that this process stored to and did not flush");
        let cached = host.cache.range(lines.clone()).map(|(line, _)| *line);
        let pending =
            host.processes.iter().flat_map(|process| process.pending.range(lines.clone()).map(|(line, _)| *line));
        let all: Vec<u64> = cached.chain(pending).collect();
        all.into_iter().for_each(|line| host.evict(memory, line));
    }

    /// Copies bytes out of the region. Lines that are not cached stay so.
    fn read_bytes(&self, at: RegionOffset, into: &mut [u8]) {
        assert!(at.0 + into.len() as u64 <= self.bytes, "read at {at:?}");
        let world = self.enter();
        let Some(host) = world.hosts.get(self.place.host) else { return };
        let mut read = 0;
        while read < into.len() {
            let position = at.0 + read as u64;
            let (line, within) = (position / LINE_BYTES, (position % LINE_BYTES) as usize);
            let cached = host.cache.get(&line).map(|cached| &cached.words);
            let own = cached.or_else(|| host.in_flight(line));
            let words = own.or_else(|| world.memory.get(line as usize));
            let bytes: &[u8] = words.map_or(&[], |words| bytemuck::bytes_of(words));
            let count = (LINE_BYTES as usize - within).min(into.len() - read);
            into[read..read + count].copy_from_slice(&bytes[within..within + count]);
            read += count;
        }
    }

    fn write_bytes(&self, at: RegionOffset, from: &[u8]) {
        for (index, byte) in from.iter().enumerate() {
            let position = at.0 + index as u64;
            let word_at = RegionOffset(position & !7);
            let mut bytes = self.load(word_at).to_le_bytes();
            bytes[(position % 8) as usize] = *byte;
            self.store(word_at, u64::from_le_bytes(bytes));
        }
    }

    fn is_coherent(&self) -> bool {
        false
    }

    fn keeps(&self, guard: Guard) -> bool {
        lock(&self.world).removed != Some(Mutation::Guard(guard))
    }
}
