//! A model of sessions, fencing and the leader's failover, explored exhaustively at small scope with stateright.
//!
//! The production code (`SessionOrder`) judges batches. Around it, each step that a crash can come between is an action of
//! its own:
//!
//! - A batch is sent, and received later or never.
//! - The leader takes a batch, publishes the tail, the commit records, and how far it consumed.
//! - The leader dies, and another recovers.
//! - The lease of a gap ends, and the client opens the next epoch.
//!
//! Each guard of the protocol is removed in turn, and a property that is named here must fail.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

use bytemuck::Zeroable;
use embarcadero_broker::sequencer::session::{Arrival, SessionOrder, Verdict};
use embarcadero_cxl::layout::{BatchEntry, SessionState};
use embarcadero_cxl::session_table::Session;
use embarcadero_wire::{BrokerId, ClientId, Epoch, Incarnation, Order, SessionSlot, SessionToken, TopicId};
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::collections::{BTreeMap, BTreeSet};

/// Number of batches of the session. With three there are more states than 20 GiB hold.
const BATCHES: u64 = 2;
/// Most sends of one batch, over all epochs: the first, and one resend.
const SENDS: u32 = 2;
/// Most leaders that die.
const DEATHS: u32 = 1;
/// Most fences of the session.
const FENCES: u32 = 1;

/// Rule of the protocol that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    /// A sequence below the expected one is a duplicate.
    Deduplicate,
    /// The tail of the index is in memory before the commit records that acknowledge.
    TailBeforeRecords,
    /// A new leader brings sessions up to the index before it takes anything.
    RecoverBeforeAccept,
    /// A batch of an epoch that is not the session's is not ordered.
    CheckEpoch,
}

struct Sessions {
    removed: Option<Guard>,
}

/// Batch on its way, or received: session epoch and sequence.
type Sent = (u32, u64);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Leader {
    /// Batches of the order index, also those beyond the published tail.
    index: Vec<Sent>,
    expected: u64,
    /// Place in the Batchlog of each held batch, by sequence.
    held: BTreeMap<u64, usize>,
    taken: usize,
    /// Epoch of the session, while it is open.
    session: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    /// Epoch that the client publishes under.
    epoch: u32,
    /// Number of times that the client sent each batch.
    sends: Vec<u32>,
    /// Batches that the client knows to be committed.
    acknowledged: BTreeSet<u64>,
    /// Copies of each batch that are on their way, some for ever.
    network: BTreeMap<Sent, u32>,
    /// Batchlog, in CXL memory as all that follows up to `leader`.
    batchlog: Vec<Sent>,
    tail: Vec<Sent>,
    records: BTreeSet<u64>,
    progress: u64,
    decided: usize,
    row_epoch: u32,
    row_open: bool,
    leader: Option<Leader>,
    deaths: u32,
    fences: u32,
    /// True once a batch was ordered under an epoch that had ended.
    resurfaced: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Action {
    Send(u64),
    Receive(Sent),
    Take,
    PublishTail,
    PublishRecords,
    PublishDecided,
    Acknowledge(u64),
    Die,
    Recover,
    Fence,
    Reopen,
}

/// Makes the session as the leader's production code keeps it.
fn order(leader: &Leader, batchlog: &[Sent]) -> SessionOrder {
    let session = Session {
        slot: SessionSlot(0),
        client_id: ClientId(1),
        epoch: Epoch(leader.session.unwrap_or(0)),
        state: SessionState::Open,
        topic: TopicId(0),
        topic_incarnation: Incarnation(1),
        committed: leader.expected,
        ack_level: 1,
        first_epoch: Epoch(0),
        first_sequence: 0,
        token: SessionToken(1),
    };
    let mut order = SessionOrder::new(session, Order::Strong, leader.expected, 0);
    for place in leader.held.values() {
        assert_eq!(order.judge(&arrival(batchlog, *place), 0), Verdict::Held);
    }
    order
}

fn arrival(batchlog: &[Sent], place: usize) -> Arrival {
    let (session_epoch, sequence) = batchlog[place];
    let entry = BatchEntry { sequence, session_epoch: Epoch(session_epoch), ..BatchEntry::zeroed() };
    Arrival { entry, broker: BrokerId(0), index: place as u64 }
}

impl Sessions {
    fn guards(&self, guard: Guard) -> bool {
        self.removed != Some(guard)
    }

    fn take(&self, state: &mut State) {
        let Some(leader) = &mut state.leader else { return };
        let place = leader.taken;
        leader.taken += 1;
        let (epoch, sequence) = state.batchlog[place];
        let Some(open) = leader.session else { return };
        if self.guards(Guard::CheckEpoch) && epoch != open {
            return;
        }
        let mut session = order(leader, &state.batchlog);
        let mut commit = |leader: &mut Leader, place: usize| {
            let (epoch, sequence) = state.batchlog[place];
            state.resurfaced |= epoch != open;
            leader.index.push((epoch, sequence));
        };
        match session.judge(&arrival(&state.batchlog, place), 0) {
            Verdict::Duplicate if self.guards(Guard::Deduplicate) || sequence >= leader.expected => {}
            Verdict::OutOfWindow => {}
            Verdict::Held => {
                leader.held.insert(sequence, place);
            }
            Verdict::Duplicate => commit(leader, place),
            Verdict::Commit => {
                commit(leader, place);
                session.committed(sequence, 0);
                while let Some(held) = session.next_held() {
                    commit(leader, held.index as usize);
                    leader.held.remove(&held.entry.sequence);
                    session.committed(held.entry.sequence, 0);
                }
                leader.expected = session.expected();
            }
        }
    }

    fn recover(&self, state: &State) -> Leader {
        let mut expected = state.progress;
        if self.guards(Guard::RecoverBeforeAccept) {
            for (_, sequence) in &state.tail {
                expected = expected.max(sequence + 1);
            }
        }
        let session = state.row_open.then_some(state.row_epoch);
        Leader { index: state.tail.clone(), expected, held: BTreeMap::new(), taken: state.decided, session }
    }
}

/// Returns true when all that the leader did is in memory. It answers commands only then.
fn published(state: &State, leader: &Leader) -> bool {
    state.tail == leader.index && state.progress == leader.expected
}

impl Model for Sessions {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let leader = Leader { index: vec![], expected: 0, held: BTreeMap::new(), taken: 0, session: Some(1) };
        vec![State {
            epoch: 1,
            sends: vec![0; BATCHES as usize],
            acknowledged: BTreeSet::new(),
            network: BTreeMap::new(),
            batchlog: vec![],
            tail: vec![],
            records: BTreeSet::new(),
            progress: 0,
            decided: 0,
            row_epoch: 1,
            row_open: true,
            leader: Some(leader),
            deaths: 0,
            fences: 0,
            resurfaced: false,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        for sequence in 0..BATCHES {
            if state.sends[sequence as usize] < SENDS && !state.acknowledged.contains(&sequence) {
                actions.push(Action::Send(sequence));
            }
            if state.records.contains(&sequence) && !state.acknowledged.contains(&sequence) {
                actions.push(Action::Acknowledge(sequence));
            }
        }
        for sent in state.network.keys() {
            actions.push(Action::Receive(*sent));
        }
        let Some(leader) = &state.leader else {
            actions.push(Action::Recover);
            return;
        };
        if leader.taken < state.batchlog.len() {
            actions.push(Action::Take);
        }
        if state.tail != leader.index {
            actions.push(Action::PublishTail);
        }
        let tail_first = state.tail == leader.index || !self.guards(Guard::TailBeforeRecords);
        if tail_first && state.progress != leader.expected {
            actions.push(Action::PublishRecords);
        }
        if published(state, leader) {
            actions.push(Action::PublishDecided);
            if !leader.held.is_empty() && state.fences < FENCES {
                actions.push(Action::Fence);
            }
            if !state.row_open {
                actions.push(Action::Reopen);
            }
        }
        if state.deaths < DEATHS {
            actions.push(Action::Die);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = last.clone();
        match action {
            Action::Send(sequence) => {
                state.sends[sequence as usize] += 1;
                *state.network.entry((state.epoch, sequence)).or_default() += 1;
            }
            Action::Receive(sent) => {
                let left = state.network.remove(&sent).unwrap_or(0) - 1;
                if left > 0 {
                    state.network.insert(sent, left);
                }
                state.batchlog.push(sent);
            }
            Action::Take => self.take(&mut state),
            Action::PublishTail => state.tail = state.leader.as_ref()?.index.clone(),
            Action::PublishRecords => {
                let leader = state.leader.as_ref()?;
                state.progress = leader.expected;
                state.records.extend(leader.index.iter().map(|(_, sequence)| *sequence));
            }
            Action::PublishDecided => {
                let leader = state.leader.as_ref()?;
                state.decided = leader.held.values().copied().min().unwrap_or(leader.taken);
            }
            Action::Acknowledge(sequence) => {
                state.acknowledged.insert(sequence);
            }
            Action::Die => {
                state.leader = None;
                state.deaths += 1;
            }
            Action::Recover => state.leader = Some(self.recover(&state)),
            Action::Fence => {
                let leader = state.leader.as_mut()?;
                leader.session = None;
                leader.held.clear();
                state.row_open = false;
                state.fences += 1;
            }
            Action::Reopen => {
                let leader = state.leader.as_mut()?;
                state.row_epoch += 1;
                state.row_open = true;
                state.epoch = state.row_epoch;
                leader.session = Some(state.row_epoch);
                // It hears what is committed, and sends the rest again.
                state.sends.iter_mut().for_each(|sends| *sends = (*sends).min(SENDS - 1));
            }
        }
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            // The case of a duplicate that comes late, from a connection that was thought dead.
            Property::always("each batch once and in order", |_, state: &State| {
                let order = state.tail.iter().map(|(_, sequence)| *sequence);
                order.eq(0..state.tail.len() as u64)
            }),
            // The case of an acknowledgement that a dead leader gave, of what the next one does not know.
            Property::always("what is acknowledged is in the order of every later leader", |_, state: &State| {
                let within = |index: &[Sent]| {
                    state.acknowledged.iter().all(|sequence| index.iter().any(|(_, known)| known == sequence))
                };
                within(&state.tail) && state.leader.as_ref().is_none_or(|leader| within(&leader.index))
            }),
            Property::always("nothing is ordered under an epoch that has ended", |_, state: &State| !state.resurfaced),
            Property::sometimes("all is acknowledged after a death and a fence", |_, state: &State| {
                state.acknowledged.len() as u64 == BATCHES && state.deaths == DEATHS && state.fences == FENCES
            }),
        ]
    }
}

#[test]
fn every_reachable_state_keeps_the_promises() {
    let checker = Sessions { removed: None }.checker().threads(2).spawn_bfs().join();
    println!("{} states, {} of them different", checker.state_count(), checker.unique_state_count());
    checker.assert_properties();
}

#[test]
fn without_a_guard_the_property_that_it_protects_fails() {
    for (guard, property) in [
        (Guard::Deduplicate, "each batch once and in order"),
        (Guard::TailBeforeRecords, "what is acknowledged is in the order of every later leader"),
        (Guard::RecoverBeforeAccept, "each batch once and in order"),
        (Guard::CheckEpoch, "nothing is ordered under an epoch that has ended"),
    ] {
        let checker = Sessions { removed: Some(guard) }
            .checker()
            .finish_when(HasDiscoveries::AnyFailures)
            .threads(2)
            .spawn_bfs()
            .join();
        let path = checker.discovery(property);
        assert!(path.is_some(), "without {guard:?}, {property:?} still holds");
        println!("without {guard:?}: {} steps to a violation", path.unwrap().into_actions().len());
    }
}
