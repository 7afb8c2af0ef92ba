//! Opening of a publisher, a call at a time.

use super::polled::PolledPublisher;
use super::session::{new_client_id, opening};
use crate::call::Call;
use crate::environment::{Control, Environment};
use crate::error::{ClientError, ControlCode};
use crate::views::ClusterView;
use embarcadero_control::v1 as proto;
use embarcadero_wire::ClientId;
use std::sync::Arc;

/// Ids that a new client tries.
const IDS: u32 = 3;

/// Publisher that is being opened.
pub struct PublisherOpening<E: Environment> {
    environment: Arc<E>,
    topic: String,
    client_id: ClientId,
    session: Call<proto::OpenSessionResponse>,
    /// Ids that are left to try.
    ids_left: u32,
    /// Session that was opened, and the call that asks for brokers after it.
    opened: Option<(proto::OpenSessionResponse, Call<proto::MetadataResponse>)>,
}

impl<E: Environment> PublisherOpening<E> {
    /// Begins to open a session on a topic.
    pub fn begin(environment: Arc<E>, topic: &str) -> Self {
        let client_id = new_client_id(&*environment);
        let session = ask(&*environment, topic, client_id);
        Self { environment, topic: topic.to_owned(), client_id, session, ids_left: IDS - 1, opened: None }
    }

    /// Goes on as far as answers have come. Returns the publisher once it is open, and connected to a broker at least.
    ///
    /// Blocks only while the transport connects.
    pub fn turn(&mut self) -> Option<Result<PolledPublisher<E>, ClientError>> {
        if self.opened.is_none() {
            match self.session.look()? {
                Ok(opened) => self.opened = Some((opened, self.environment.control().cluster())),
                // This client's, whose answer was lost with a leader. Its token was lost, too.
                Err(ClientError::Control { code: ControlCode::AlreadyExists, .. }) if self.ids_left > 0 => {
                    self.ids_left -= 1;
                    self.client_id = new_client_id(&*self.environment);
                    self.session = ask(&*self.environment, &self.topic, self.client_id);
                    return None;
                }
                Err(error) => return Some(Err(error)),
            }
        }
        let cluster = self.opened.as_mut()?.1.look()?;
        Some(cluster.and_then(|cluster| self.finish(cluster)))
    }

    fn finish(&mut self, cluster: proto::MetadataResponse) -> Result<PolledPublisher<E>, ClientError> {
        let cluster = ClusterView::from_proto(cluster)?;
        let (opened, _) = self.opened.take().ok_or_else(|| ClientError::unreachable("the session is not open"))?;
        let environment = Arc::clone(&self.environment);
        let publisher = PolledPublisher::new(environment, &self.topic, self.client_id, &opened, cluster)?;
        publisher.connect_due();
        publisher.require_connection()?;
        Ok(publisher)
    }

    /// Blocks until the call under way is answered.
    pub(super) fn wait(&mut self) {
        match &mut self.opened {
            None => self.session.wait(),
            Some((_, cluster)) => cluster.wait(),
        }
    }
}

/// Asks for a session of a client.
fn ask<E: Environment>(environment: &E, topic: &str, client_id: ClientId) -> Call<proto::OpenSessionResponse> {
    environment.control().open_session(opening(topic, client_id, environment.config().ack_level))
}
