//! A fabric without coherence, in one process, from one seed.
//!
//! Each host has its own cache:
//!
//! - A store stays in it until it is flushed *and* fenced, or until the line is evicted at a random moment.
//! - A line that was read stays as it was until it is invalidated or evicted.
//! - A flush that no fence follows completes at a random moment.
//! - A flush that is fenced completes before any later store or flush of the host does, but maybe after later loads. A full
//!   fence completes it at once.
//! - A write-back moves a whole line. Two hosts that write one line therefore destroy each other's words, as in real memory.
//! - A crashed host loses its cache.

use embarcadero_cxl::{Fabric, Guard, LINE_BYTES, RegionOffset, Site};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
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
    dirty: bool,
}

#[derive(Default)]
struct Host {
    cache: BTreeMap<u64, CachedLine>,
    /// Lines that are flushed and not fenced, as they were when flushed.
    pending: BTreeMap<u64, LineWords>,
    /// Lines that are flushed and fenced. They reach memory, all at once, before any other line of this host does.
    fenced: BTreeMap<u64, LineWords>,
    crashed: bool,
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
        hosts.iter_mut().for_each(|host| Self::settle(memory, host));
    }

    /// Returns how often the hosts passed a site.
    #[must_use]
    pub fn visits(&self, site: Site) -> u64 {
        self.visits.get(&(site as u8)).copied().unwrap_or(0)
    }

    fn write_memory(memory: &mut [LineWords], line: u64, words: LineWords) {
        if let Some(slot) = memory.get_mut(line as usize) {
            *slot = words;
        }
    }

    /// Completes the fenced flushes of a host.
    fn settle(memory: &mut [LineWords], host: &mut Host) {
        for (line, words) in std::mem::take(&mut host.fenced) {
            Self::write_memory(memory, line, words);
        }
    }

    fn weather(&mut self, host: usize) {
        let Self { memory, hosts, rng, turbulence, .. } = self;
        let Some(host) = hosts.get_mut(host) else { return };
        if turbulence.drain > 0.0 && !host.fenced.is_empty() && rng.random_bool(turbulence.drain) {
            Self::settle(memory, host);
        }
        if turbulence.drain > 0.0 && !host.pending.is_empty() && rng.random_bool(turbulence.drain) {
            let pick = rng.random_range(0..host.pending.len());
            if let Some(line) = host.pending.keys().nth(pick).copied()
                && let Some(words) = host.pending.remove(&line)
            {
                Self::settle(memory, host);
                Self::write_memory(memory, line, words);
            }
        }
        if turbulence.evict > 0.0 && !host.cache.is_empty() && rng.random_bool(turbulence.evict) {
            let pick = rng.random_range(0..host.cache.len());
            if let Some(line) = host.cache.keys().nth(pick).copied() {
                Self::evict(memory, host, line);
            }
        }
    }

    fn evict(memory: &mut [LineWords], host: &mut Host, line: u64) {
        let flushed = host.pending.remove(&line);
        if let Some(cached) = host.cache.remove(&line)
            && cached.dirty
        {
            Self::settle(memory, host);
            Self::write_memory(memory, line, cached.words);
            return;
        }
        if let Some(words) = flushed {
            Self::settle(memory, host);
            Self::write_memory(memory, line, words);
        }
    }

    fn line_of(&mut self, host: usize, line: u64) -> Option<&mut CachedLine> {
        let Self { memory, hosts, rng, turbulence, .. } = self;
        let host = hosts.get_mut(host)?;
        if !host.cache.contains_key(&line) {
            let fetch = |line: u64| memory.get(line as usize).map(|words| CachedLine { words: *words, dirty: false });
            let mut fetched = fetch(line)?;
            if let Some(own) = host.pending.get(&line).or_else(|| host.fenced.get(&line)) {
                fetched.words = *own;
            }
            if turbulence.prefetch > 0.0
                && rng.random_bool(turbulence.prefetch)
                && !host.cache.contains_key(&(line + 1))
                && !host.pending.contains_key(&(line + 1))
                && !host.fenced.contains_key(&(line + 1))
                && let Some(next) = fetch(line + 1)
            {
                host.cache.insert(line + 1, next);
            }
            host.cache.insert(line, fetched);
        }
        host.cache.get_mut(&line)
    }

    fn fence(&mut self, host: usize, full: bool) {
        let Self { memory, hosts, rng, turbulence, .. } = self;
        let Some(host) = hosts.get_mut(host) else { return };
        if host.crashed {
            return;
        }
        host.fenced.append(&mut host.pending);
        if full || turbulence.delay == 0.0 || !rng.random_bool(turbulence.delay) {
            Self::settle(memory, host);
        }
    }

    fn passes(&mut self, site: Site) -> bool {
        *self.visits.entry(site as u8).or_default() += 1;
        self.removed != Some(Mutation::Site(site))
    }
}

/// View that one host has of a [`World`]. Other hosts may run before each of its operations.
#[derive(Clone)]
pub struct Simulated {
    world: Arc<Mutex<World>>,
    host: usize,
    bytes: u64,
    interleave: fn(),
}

impl Simulated {
    /// Adds a host to the world. `interleave` is called before every operation: a deterministic scheduler may switch to
    /// another host there.
    #[must_use]
    pub fn join(world: &Arc<Mutex<World>>, interleave: fn()) -> Self {
        let mut inner = lock(world);
        inner.hosts.push(Host::default());
        let host = inner.hosts.len() - 1;
        let bytes = inner.memory.len() as u64 * LINE_BYTES;
        drop(inner);
        Self { world: Arc::clone(world), host, bytes, interleave }
    }

    /// Stops the host for good. Its cache is lost, and unfenced flushes complete or not by chance. Whatever its code still
    /// does reaches nobody.
    pub fn crash(&self) {
        let mut world = lock(&self.world);
        let World { memory, hosts, rng, .. } = &mut *world;
        if let Some(host) = hosts.get_mut(self.host) {
            World::settle(memory, host);
            for (line, words) in std::mem::take(&mut host.pending) {
                if rng.random_bool(0.5) {
                    World::write_memory(memory, line, words);
                }
            }
            host.cache.clear();
            host.crashed = true;
        }
    }

    /// Begins an operation: something may happen by chance, and then other hosts may run.
    fn enter(&self) -> MutexGuard<'_, World> {
        lock(&self.world).weather(self.host);
        (self.interleave)();
        lock(&self.world)
    }

    fn lines(at: RegionOffset, len: u64) -> std::ops::Range<u64> {
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
        world.line_of(self.host, at.0 / LINE_BYTES).map_or(0, |line| line.words[word])
    }

    fn store(&self, at: RegionOffset, value: u64) {
        assert!(at.0 + 8 <= self.bytes && at.0.is_multiple_of(8), "store at {at:?}");
        let mut world = self.enter();
        if world.hosts.get(self.host).is_none_or(|host| host.crashed) {
            return;
        }
        let word = (at.0 % LINE_BYTES / 8) as usize;
        if let Some(line) = world.line_of(self.host, at.0 / LINE_BYTES) {
            line.words[word] = value;
            line.dirty = true;
        }
    }

    fn flush(&self, at: RegionOffset, len: u64, site: Site) {
        let mut world = self.enter();
        if !world.passes(site) {
            return;
        }
        let Some(host) = world.hosts.get_mut(self.host) else { return };
        if host.crashed {
            return;
        }
        for (line, cached) in host.cache.range_mut(Self::lines(at, len)) {
            if cached.dirty {
                cached.dirty = false;
                host.pending.insert(*line, cached.words);
            }
        }
    }

    fn fence(&self, site: Site) {
        let mut world = self.enter();
        if world.passes(site) {
            world.fence(self.host, false);
        }
    }

    fn full_fence(&self, site: Site) {
        let mut world = self.enter();
        if world.passes(site) {
            let full = world.removed != Some(Mutation::FullFence(site));
            world.fence(self.host, full);
        }
    }

    fn invalidate(&self, at: RegionOffset, len: u64, site: Site) {
        let mut world = self.enter();
        if !world.passes(site) {
            return;
        }
        let World { memory, hosts, .. } = &mut *world;
        let Some(host) = hosts.get_mut(self.host) else { return };
        let lines = Self::lines(at, len);
        let cached: Vec<u64> = host.cache.range(lines.clone()).map(|(line, _)| *line).collect();
        let pending: Vec<u64> = host.pending.range(lines).map(|(line, _)| *line).collect();
        for line in cached.into_iter().chain(pending) {
            if host.crashed {
                host.cache.remove(&line);
            } else {
                // A reader drops lines that it does not write; a writer that forgot to flush is caught here.
                let dirty = host.cache.get(&line).is_some_and(|cached| cached.dirty);
                assert!(!dirty, "{site:?} drops line {line:#x} that this host wrote and did not flush");
                World::evict(memory, host, line);
            }
        }
    }

    /// Copies bytes out of the region. Lines that are not cached stay so.
    fn read_bytes(&self, at: RegionOffset, into: &mut [u8]) {
        assert!(at.0 + into.len() as u64 <= self.bytes, "read at {at:?}");
        let world = self.enter();
        let Some(host) = world.hosts.get(self.host) else { return };
        let mut read = 0;
        while read < into.len() {
            let position = at.0 + read as u64;
            let (line, within) = (position / LINE_BYTES, (position % LINE_BYTES) as usize);
            let cached = host.cache.get(&line).map(|cached| &cached.words);
            let own = cached.or_else(|| host.pending.get(&line)).or_else(|| host.fenced.get(&line));
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
