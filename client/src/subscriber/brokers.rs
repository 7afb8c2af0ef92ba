//! Watch over the brokers of a cluster, for subscribers that read a stream of each.

use crate::background::BackgroundTask;
use crate::context::Context;
use crate::views::BrokerView;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Time after which the list of brokers is asked for again.
const REFRESH: Duration = Duration::from_secs(1);

struct Watched {
    refreshed_at: Instant,
    brokers: Vec<BrokerView>,
}

/// Watch over the brokers of a cluster. The background thread asks for them, so that reading never waits for the answer.
pub(super) struct BrokerWatch {
    context: Arc<Context>,
    watched: Mutex<Watched>,
    /// True when the list has changed since it was taken.
    news: AtomicBool,
}

impl BrokerWatch {
    /// Watch that knows `brokers`.
    pub(super) fn new(context: Arc<Context>, brokers: Vec<BrokerView>) -> Self {
        let watched = Mutex::new(Watched { refreshed_at: Instant::now(), brokers });
        Self { context, watched, news: AtomicBool::new(false) }
    }

    fn watched(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the list of brokers, if it has changed.
    pub(super) fn take_news(&self) -> Option<Vec<BrokerView>> {
        if !self.news.load(Ordering::Relaxed) {
            return None;
        }
        let watched = self.watched();
        self.news.store(false, Ordering::Relaxed);
        Some(watched.brokers.clone())
    }

    /// Takes a new list of brokers from the cluster.
    fn update(&self, brokers: Vec<BrokerView>) {
        let mut watched = self.watched();
        if watched.brokers != brokers {
            watched.brokers = brokers;
            self.news.store(true, Ordering::Relaxed);
        }
    }
}

impl BackgroundTask for BrokerWatch {
    fn run_once(&self) -> bool {
        {
            let mut watched = self.watched();
            if watched.refreshed_at.elapsed() < REFRESH {
                return false;
            }
            watched.refreshed_at = Instant::now();
        }
        // While no broker answers, those that are known have to do.
        if let Ok(cluster) = self.context.cluster() {
            self.update(cluster.brokers);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ClientConfig;
    use embarcadero_wire::{BrokerId, Incarnation};
    use std::net::{Ipv4Addr, SocketAddr};

    #[test]
    fn a_list_is_news_once_when_it_has_changed() {
        let broker = |id| BrokerView {
            id: BrokerId(id),
            incarnation: Incarnation(1),
            data: SocketAddr::from((Ipv4Addr::LOCALHOST, 1)),
            control: String::new(),
            leader: false,
        };
        let context = Arc::new(Context::new(ClientConfig::default()).unwrap());
        let watch = BrokerWatch::new(context, vec![broker(0)]);
        watch.update(vec![broker(0)]);
        assert_eq!(watch.take_news(), None);
        watch.update(vec![broker(0), broker(1)]);
        assert_eq!(watch.take_news(), Some(vec![broker(0), broker(1)]));
        assert_eq!(watch.take_news(), None);
    }
}
