//! Upkeep of a publisher: the calls that open its session's next epoch, and that find its brokers.

use super::sender::Sender;
use super::session::{new_client_id, opening};
use crate::call::Call;
use crate::environment::{Control, Environment};
use crate::views::ClusterView;
use embarcadero_control::v1 as proto;
use embarcadero_wire::ClientId;
use std::time::{Duration, Instant};

/// Time after which the publisher asks for the list of brokers again.
const REFRESH: Duration = Duration::from_secs(1);

/// Call that opens the session's next epoch.
struct Reopening {
    /// Client as which the publisher goes on after its session was lost; `None` to go on with the session.
    anew: Option<ClientId>,
    call: Call<proto::OpenSessionResponse>,
}

/// Calls of a publisher to the control plane that are under way.
#[derive(Default)]
pub(super) struct Calls {
    reopening: Option<Reopening>,
    brokers: Option<Call<proto::MetadataResponse>>,
}

impl Calls {
    /// Returns true while there are any.
    pub(super) fn are_under_way(&self) -> bool {
        self.reopening.is_some() || self.brokers.is_some()
    }
}

impl<E: Environment> Sender<E> {
    /// Begins the calls to the control plane that are due, and takes the answers that have come.
    pub(super) fn keep_up(&mut self, now: Instant) {
        self.keep_session(now);
        self.keep_brokers(now);
    }

    /// Opens the session's next epoch once the last has ended.
    fn keep_session(&mut self, now: Instant) {
        let Some(reopening) = &mut self.calls.reopening else {
            if self.is_due_to_reopen(now) {
                self.reopen(None);
            }
            return;
        };
        let Some(answer) = reopening.call.look() else { return };
        let anew = reopening.anew;
        self.calls.reopening = None;
        match (answer, anew) {
            (Ok(opened), Some(client_id)) => {
                self.session.begun_anew(&opened, &self.topic, client_id, &self.in_flight);
                self.resubmit();
            }
            (Ok(opened), None) if opened.epoch > 0 => self.resume(&opened),
            (Ok(_), None) => self.begin_anew(),
            (Err(error), _) => self.reopening_failed(error, now),
        }
    }

    /// Asks for the session's next epoch, or for a session of another client.
    fn reopen(&mut self, anew: Option<ClientId>) {
        let request = match anew {
            Some(client_id) => opening(&self.topic.name, client_id, self.session.ack_level),
            None => self.session.resumption(&self.topic),
        };
        let call = self.environment.control().open_session(request);
        self.calls.reopening = Some(Reopening { anew, call });
    }

    /// Goes on under the session's next epoch, with the batches that did not commit under the last.
    fn resume(&mut self, opened: &proto::OpenSessionResponse) {
        match self.session.resumed(opened, &self.topic, &mut self.in_flight) {
            Ok(()) => self.resubmit(),
            Err(error) => self.fatal = Some(error),
        }
    }

    /// Opens a session as another client if nothing is in doubt: the brokers do not know the last one any more.
    fn begin_anew(&mut self) {
        match self.session.lost(&self.topic, &mut self.in_flight) {
            Ok(()) => self.reopen(Some(new_client_id(&*self.environment))),
            Err(error) => self.fatal = Some(error),
        }
    }

    /// Asks for the list of brokers once it is old: brokers come and go while connections last.
    fn keep_brokers(&mut self, now: Instant) {
        if let Some(answer) = self.calls.brokers.as_mut().and_then(Call::look) {
            self.calls.brokers = None;
            // While no broker answers, those that are known have to do.
            if let Ok(cluster) = answer.and_then(ClusterView::from_proto) {
                self.update_brokers(cluster.brokers);
            }
        }
        if self.fatal.is_none() && now.saturating_duration_since(self.refreshed_at) > REFRESH {
            self.ask_for_brokers(now);
        }
    }

    /// Asks for the list of brokers, unless it is being asked for.
    pub(super) fn ask_for_brokers(&mut self, now: Instant) {
        self.refreshed_at = now;
        let environment = &self.environment;
        self.calls.brokers.get_or_insert_with(|| environment.control().cluster());
    }
}
