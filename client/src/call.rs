//! Calls that are under way: begun, and looked at until their answers have come.

use crate::error::ClientError;
use std::sync::mpsc::{Receiver, RecvError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Mutex, PoisonError};

type Answer<R> = Result<R, ClientError>;

/// Call that is under way.
#[derive(Debug)]
pub struct Call<R> {
    /// Receiver of the answer. Only unique references reach it: the lock makes a call `Sync`.
    answers: Mutex<Receiver<Answer<R>>>,
    /// Answer that has come, and that nobody has looked for since.
    answer: Option<Answer<R>>,
}

/// End of a call at which it is answered. A call whose end is dropped without an answer fails.
#[derive(Debug)]
pub struct Reply<R>(SyncSender<Answer<R>>);

impl<R> Reply<R> {
    /// Answers the call. Nobody may be waiting for it any more.
    pub fn send(self, answer: Result<R, ClientError>) {
        let _ = self.0.send(answer);
    }
}

impl<R> Call<R> {
    /// Call that is under way, and the end at which it is answered.
    #[must_use]
    pub fn begin() -> (Reply<R>, Self) {
        let (reply, answers) = sync_channel(1);
        (Reply(reply), Self { answers: Mutex::new(answers), answer: None })
    }

    fn answers(&mut self) -> &mut Receiver<Answer<R>> {
        self.answers.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the answer, if it has come. Never blocks.
    pub fn look(&mut self) -> Option<Result<R, ClientError>> {
        match self.answer.take() {
            None => match self.answers().try_recv() {
                Ok(answer) => Some(answer),
                Err(TryRecvError::Empty) => None,
                Err(TryRecvError::Disconnected) => Some(Err(unanswered())),
            },
            answer => answer,
        }
    }

    /// Blocks until the answer has come, which the next look takes.
    pub(crate) fn wait(&mut self) {
        if self.answer.is_none() {
            let received = self.answers().recv();
            self.answer = Some(received.unwrap_or_else(|RecvError| Err(unanswered())));
        }
    }

    /// Blocks until the answer has come, and takes it.
    pub(crate) fn join(mut self) -> Result<R, ClientError> {
        self.wait();
        self.answer.take().unwrap_or_else(|| Err(unanswered()))
    }
}

fn unanswered() -> ClientError {
    ClientError::unreachable("the call to the control plane was given up")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_taken_once() {
        let (reply, mut call) = Call::begin();
        assert!(call.look().is_none());
        reply.send(Ok(7));
        call.wait();
        call.wait();
        assert!(matches!(call.look(), Some(Ok(7))));
    }

    #[test]
    fn a_call_that_nobody_answers_any_more_fails() {
        let (reply, mut call) = Call::<u32>::begin();
        drop(reply);
        assert!(matches!(call.look(), Some(Err(ClientError::Unreachable { .. }))));
        let (reply, call) = Call::<u32>::begin();
        drop(reply);
        assert!(matches!(call.join(), Err(ClientError::Unreachable { .. })));
    }
}
