//! A client, which publishes in one session. It resends batches that it hears nothing of, and opens the next epoch when its
//! session is fenced. Sometimes it crashes, and forgets everything but its id.

use super::fate::{Clock, one_in, random};
use super::network::{Answer, Batch, Request, id_of};
use super::nic::{self, Link};
use super::{HOSTS, Rack};
use embarcadero_cxl::session_table::Session;
use embarcadero_roce::psn::Psn;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Most batches that a client has under way.
const WINDOW: usize = 8;
/// Time for which a client waits for an answer, in microseconds of its own clock.
const PATIENCE_US: u64 = 8000;

pub(crate) struct Client {
    id: usize,
    rack: Arc<Rack>,
    clock: Clock,
    session: Option<Session>,
    /// Number of sessions that hosts have forgotten.
    lost: u64,
    /// True if it may have batches in the last session.
    resume: bool,
    attempt: u64,
    /// Host that it publishes to.
    broker: usize,
    /// Connection to each host, in a rack with NICs.
    links: [Option<Link>; HOSTS],
    /// Number of the first packet to each host that it waits for a window of.
    connecting: [Option<Psn>; HOSTS],
    heard_us: u64,
    next_sequence: u64,
    /// Batches that are not acknowledged: sequence to content.
    under_way: BTreeMap<u64, u64>,
    /// Content of the next batch.
    next: u64,
    /// Content after that of the last batch.
    end: u64,
}

impl Client {
    pub(crate) fn new(id: usize, rack: &Arc<Rack>, batches: u64) -> Self {
        Self {
            id,
            rack: Arc::clone(rack),
            clock: Clock::drifting(),
            session: None,
            lost: 0,
            resume: false,
            attempt: 0,
            broker: 0,
            links: Default::default(),
            connecting: [None; HOSTS],
            heard_us: 0,
            next_sequence: 0,
            under_way: BTreeMap::new(),
            next: 0,
            end: batches,
        }
    }

    /// Returns true when it has published everything, and all of it is acknowledged.
    pub(crate) fn is_done(&self) -> bool {
        self.next == self.end && self.under_way.is_empty()
    }

    /// Describes what it waits for, for a report.
    pub(crate) fn state(&self) -> String {
        format!(
            "client {}: {:?} under way, next {} of {}, {:?}",
            self.id, self.under_way, self.next, self.end, self.session
        )
    }

    /// Crashes and starts again. It no longer knows of batches that were under way.
    pub(crate) fn crash(&mut self) {
        self.rack.history.count(|tally| &mut tally.client_crashes);
        self.session = None;
        self.resume = false;
        self.under_way.clear();
        self.links = Default::default();
        self.connecting = [None; HOSTS];
        self.attempt += 1;
    }

    pub(crate) fn round(&mut self) {
        while let Some(answer) = self.rack.network.take_answer(self.id) {
            self.heed(answer);
        }
        nic::drive(self.id, &mut self.links, self.clock.now_us(), &self.rack.network);
        let late = self.clock.now_us().saturating_sub(self.heard_us) > PATIENCE_US;
        let Some(session) = self.session else {
            if late {
                self.heard_us = self.clock.now_us();
                self.attempt += 1;
                // The leader is one of them.
                for host in 0..HOSTS {
                    let (id, resume, attempt) = (id_of(self.id, self.lost), self.resume, self.attempt);
                    self.rack.network.request(host, Request::OpenSession { id, resume, attempt });
                }
            }
            return;
        };
        if late && !self.under_way.is_empty() {
            self.heard_us = self.clock.now_us();
            // It may hear nothing because the host started again and knows nothing of the connection.
            self.links[self.broker] = None;
            self.broker = random(0..HOSTS as u64) as usize;
            self.connecting[self.broker] = None;
            self.send_again(session);
        }
        while self.under_way.len() < WINDOW && self.next < self.end {
            let (sequence, content) = (self.next_sequence, self.next);
            self.under_way.insert(sequence, content);
            (self.next_sequence, self.next) = (sequence + 1, content + 1);
            self.send(session, sequence, content);
            if one_in(4) {
                // Striped over brokers.
                self.broker = random(0..HOSTS as u64) as usize;
            }
        }
    }

    fn send(&mut self, session: Session, sequence: u64, content: u64) {
        let resume_from = self.under_way.keys().next().copied().unwrap_or(sequence);
        let batch = Batch { session, sequence, content, resume_from };
        if self.rack.has_nics {
            self.write(&batch);
        } else {
            self.rack.network.request(self.broker, Request::Publish(batch));
        }
    }

    /// Writes a batch to the broker's window. If there is none, it asks for one once, and resends when it has it.
    fn write(&mut self, batch: &Batch) {
        let (client, host) = (self.id, self.broker);
        if let Some(link) = &mut self.links[host] {
            if link.write(batch) {
                return;
            }
            let broken = link.failure().is_some();
            self.rack.history.count(|tally| if broken { &mut tally.broken_links } else { &mut tally.used_windows });
            self.links[host] = None;
        }
        if self.connecting[host].is_none() {
            let psn = nic::first_psn();
            self.connecting[host] = Some(psn);
            self.rack.network.request(host, Request::Connect { client, psn });
        }
    }

    fn send_again(&mut self, session: Session) {
        let resend: Vec<_> = self.under_way.clone().into_iter().collect();
        resend.into_iter().for_each(|(sequence, content)| self.send(session, sequence, content));
    }

    fn heed(&mut self, answer: Answer) {
        let own = self.session.map(|session| (session.client_id, session.epoch));
        match answer {
            Answer::Ack(id, ack) if Some((id, ack.session_epoch)) == own => {
                self.heard_us = self.clock.now_us();
                if let Some(content) = self.under_way.remove(&ack.sequence) {
                    self.rack.history.acknowledged(self.id, content, ack.first_offset);
                }
            }
            Answer::Fenced(id, epoch) if Some((id, epoch)) == own => {
                self.session = None;
                self.heard_us = 0;
            }
            Answer::Opened { attempt, session: None } if attempt == self.attempt => {
                // Nobody knows what became of the batches under way. An application would be told.
                self.rack.history.count(|tally| &mut tally.lost_sessions);
                self.under_way.clear();
                (self.lost, self.resume, self.heard_us) = (self.lost + 1, false, 0);
                self.attempt += 1;
            }
            Answer::Opened { attempt, session: Some(session) } if attempt == self.attempt && self.session.is_none() => {
                self.heard_us = self.clock.now_us();
                self.session = Some(session);
                // What else comes of this attempt is old.
                self.attempt += 1;
                self.rack.history.count(|tally| &mut tally.epochs);
                // Sequences name the same batches for ever: what is below `committed` is in the order, what is not is
                // sent again under the new epoch.
                let first = self.under_way.keys().next().copied();
                if self.resume {
                    let sent = first.unwrap_or(self.next_sequence)..=self.next_sequence;
                    assert!(sent.contains(&session.committed), "{sent:?} are this client's: {session:?}");
                } else {
                    self.next_sequence = session.committed;
                }
                self.resume = true;
                self.send_again(session);
            }
            Answer::Connected { host, window } if self.connecting[host] == Some(window.client_psn) => {
                self.connecting[host] = None;
                self.links[host] = Some(Link::new(self.id, host, window));
                if let Some(session) = self.session.filter(|_| self.broker == host) {
                    self.send_again(session);
                }
            }
            _ => {}
        }
    }
}
